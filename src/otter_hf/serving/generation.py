"""What the server asks of `generate` that transformers has not."""

import copy
import threading

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from .request import ChatOptions


# tokens of an answer where neither the request nor the model's folder asks for more
_NEW_TOKENS = 1024


def config_of(model: PreTrainedModel, body: dict, options: ChatOptions) -> GenerationConfig:
    """
    What a request asks of `generate`, over the settings of the model's folder. Its `seed` is set when generation
    starts, its stop strings are found in the text.

    Raises:
        ValueError: for a `logit_bias` of a token that there is not.
    """
    config = copy.deepcopy(model.generation_config)
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    config.max_new_tokens = asked or max(config.max_new_tokens or 0, _NEW_TOKENS)
    if body.get("top_p") is not None:
        config.top_p = float(body["top_p"])
    for setting, value in options.generation.items():
        setattr(config, setting, value)
    if options.logit_bias:
        size = model.config.get_text_config().vocab_size
        if max(options.logit_bias) >= size:
            raise ValueError(f"logit_bias has the token id {max(options.logit_bias)}, but the model has {size}.")
        config.sequence_bias = {(token,): value for token, value in options.logit_bias.items()}
    if body.get("temperature") is None:
        # who says how to sample wants it
        cut = body.get("top_p") not in (None, 1) or any(map(options.generation.get, ("top_k", "min_p")))
        config.do_sample = options.generation.get("do_sample", config.do_sample or bool(cut))
    else:
        config.do_sample = body["temperature"] > 0
        # as vLLM has it: logits divided by less are infinite in half precision
        config.temperature = max(float(body["temperature"]), 0.01)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = config.min_p = None
    return config


class StopWhenCancelled(StoppingCriteria):
    """Ends generation when nobody reads on."""

    def __init__(self, cancelled: threading.Event):
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


class RepeatPenalty(LogitsProcessor):
    """
    OpenAI's penalties: from a token's logit its number in the answer so far times `frequency`, and `presence` if it is
    there at all.

    Args:
        prompt_length: tokens in front of the answer.
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float):
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)  # (B, V)
