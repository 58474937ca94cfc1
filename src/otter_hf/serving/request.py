"""What a chat completion request may say, checked before any work is done for it."""

import json
import math
from dataclasses import dataclass
from numbers import Real


# The OpenAI API has them, this server does not; left out silently they would give an answer nobody asked for. With
# each the values that ask for nothing, beside null, false and empty ones.
UNSUPPORTED = {
    "tools": (),
    "functions": (),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (),
}
# say who asks or what could be kept for later, neither of which changes an answer; there are no tools to be called
WITHOUT_EFFECT = (
    *("user", "safety_identifier", "metadata"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls"),
)
RANGES = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "max_tokens": (1, None),
    "max_completion_tokens": (1, None),
    "min_tokens": (0, None),
    "n": (1, None),
    "top_logprobs": (0, 20),
    "seed": (-(2**63), 2**63 - 1),
}
WHOLE = ("max_tokens", "max_completion_tokens", "min_tokens", "n", "top_logprobs", "seed")
SWITCHES = ("stream", "ignore_eos", "logprobs")
# of transformers' generation_config, which a request may carry as JSON, or by themselves, as clients of vLLM do:
# name -> type, smallest, largest
GENERATION = {
    "num_beams": (int, 1, 8),
    "no_repeat_ngram_size": (int, 0, 64),
    "top_k": (int, -1, 100_000),  # -1 and 0 are all
    "min_p": (float, 0, 1),
    "length_penalty": (float, -10, 10),
    "repetition_penalty": (float, 0.01, 10),
    "early_stopping": (bool, False, True),
    "do_sample": (bool, False, True),
}
# fields of the request that are not OpenAI's
OWN = (*GENERATION, "min_tokens", "ignore_eos", "generation_config", "chat_template_kwargs")
KNOWN = {*UNSUPPORTED, *WITHOUT_EFFECT, *RANGES, *SWITCHES, *OWN}
KNOWN |= {"model", "messages", "stop", "stream_options", "logit_bias"}
MAX_STOPS = 16


@dataclass(frozen=True)
class ChatOptions:
    """What a request asks for beside its messages."""

    choices: int  # answers
    top_logprobs: int | None  # told of each token beside its own; None: nothing is
    stops: list[str]
    num_frames: int | None
    generation: dict
    logit_bias: dict[int, float]
    least_tokens: float  # before the answer may end by itself
    usage_apart: bool  # the numbers of tokens come in a piece of their own, behind the last
    usage_so_far: bool  # and with each piece


def unknown_field(body: dict) -> str | None:
    """The sentence about a field that this server does not know; None if it knows all."""
    name = next((name for name in body if name not in KNOWN), None)
    if name is None:
        return None
    return (
        f"The request has {name!r:.80}, which this server does not know; leave it out. Beside OpenAI's fields it "
        f"takes {', '.join(OWN)}."
    )


def check_request(body) -> ChatOptions:
    """
    Check everything but the messages.

    Raises:
        ValueError: naming the field, its value and what it may be.
    """
    for name, harmless in UNSUPPORTED.items():
        value = body.get(name)
        asks_nothing = value is None or value is False or value in ([], {})
        if not asks_nothing and (isinstance(value, bool) or value not in harmless):
            raise ValueError(f"{name} is {value!r:.80}, which this server does not support; leave it out.")
    if body.get("model") is not None and not isinstance(body["model"], str):
        raise ValueError("model must be a name.")
    for name, (low, high) in RANGES.items():
        if body.get(name) is not None:
            _check_number(name, body[name], int if name in WHOLE else float, low, high)
    for name in SWITCHES:
        if not isinstance(body.get(name) or False, bool):
            raise ValueError(f"{name} must be true or false, not {body[name]!r:.80}.")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise ValueError(f"top_logprobs is {body['top_logprobs']}, which needs logprobs: true.")
    most, longest = body.get("max_tokens"), body.get("max_completion_tokens")
    if None not in (most, longest) and most != longest:
        raise ValueError(
            f"max_tokens is {most}, and max_completion_tokens {longest}, which are the same; say it once."
        )
    generation, temperature = _generation(body), body.get("temperature")
    if None not in (temperature, generation.get("do_sample")) and (temperature > 0) != generation["do_sample"]:
        does = "draws tokens" if temperature > 0 else "takes the likeliest"
        raise ValueError(
            f"temperature is {temperature}, which {does}, and do_sample {str(generation['do_sample']).lower()}; leave "
            "one of them out."
        )
    usage = _stream_options(body.get("stream_options"))
    return ChatOptions(
        1 if body.get("n") is None else body["n"],
        (body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        _stops(body.get("stop")),
        _num_frames(body.get("chat_template_kwargs")),
        generation,
        _logit_bias(body.get("logit_bias")),
        least_tokens=math.inf if body.get("ignore_eos") else body.get("min_tokens") or 0,
        usage_apart=usage.get("include_usage") is True,
        # of vLLM, which bench clients send
        usage_so_far=usage.get("continuous_usage_stats") is True,
    )


def _stream_options(options) -> dict:
    known = ("include_usage", "include_obfuscation", "continuous_usage_stats")
    if options and (not isinstance(options, dict) or not set(options) <= set(known)):
        raise ValueError(f"stream_options must be an object with {', '.join(known)}, not {options!r:.80}.")
    return options or {}


def _logit_bias(bias) -> dict[int, float]:
    if not isinstance(bias, (dict, type(None))):
        raise ValueError(f"logit_bias must be an object of token ids and numbers, not {bias!r:.80}.")
    biases = {}
    for token, value in (bias or {}).items():
        if not token.isdecimal() or not token.isascii():
            raise ValueError(f"logit_bias has the key {token!r:.80}; its keys must be token ids, as digits.")
        _check_number(f"logit_bias[{token}]", value, float, -100, 100)
        biases[int(token)] = float(value)
    return biases


def _stops(stop) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, list) else []
    if (stop is not None and not isinstance(stop, (str, list))) or len(stops) > MAX_STOPS:
        raise ValueError(f"stop must be a text or a list of at most {MAX_STOPS} texts.")
    if not all(isinstance(text, str) and 0 < len(text) <= 256 for text in stops):
        raise ValueError("stop must hold texts of 1 to 256 characters.")
    return stops


def _num_frames(template_kwargs) -> int | None:
    if not template_kwargs:
        return None
    if not isinstance(template_kwargs, dict) or set(template_kwargs) != {"num_frames"}:
        raise ValueError('chat_template_kwargs may hold {"num_frames": ...} and nothing else.')
    _check_number("chat_template_kwargs.num_frames", template_kwargs["num_frames"], int, 1, None)
    return template_kwargs["num_frames"]


def _generation(body: dict) -> dict:
    settings = body.get("generation_config")
    settings = {} if settings is None else settings
    try:
        settings = json.loads(settings) if isinstance(settings, str) else settings
    except ValueError as error:
        raise ValueError(f"generation_config is not JSON: {error}") from error
    if not isinstance(settings, dict) or not set(settings) <= set(GENERATION):
        raise ValueError(f"generation_config must be a JSON object with {', '.join(GENERATION)} and nothing else.")
    for name, value in settings.items():
        _check_number(f"generation_config.{name}", value, *GENERATION[name])
    for name in GENERATION:
        if body.get(name) is not None:
            _check_number(name, body[name], *GENERATION[name])
            if settings.setdefault(name, body[name]) != body[name]:
                of_both = f"{body[name]!r}, and {settings[name]!r} in generation_config"
                raise ValueError(f"{name} is {of_both}; say it once.")
    # transformers refuses a whole number where it asks for a float
    settings = {name: GENERATION[name][0](value) for name, value in settings.items()}
    return settings | ({"top_k": 0} if settings.get("top_k") == -1 else {})


def _check_number(name: str, value, kind: type, low, high) -> None:
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, int if kind is int else Real) and not isinstance(value, bool)
        fits = fits and value >= low and (high is None or value <= high)
    if not fits:
        words = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        limits = "" if kind is bool else f" of {low} or more" if high is None else f" from {low} to {high}"
        raise ValueError(f"{name} must be {words}{limits}, not {value!r:.80}.")
