"""What `otter-hf eval` reads: the YAML of 2023, and a plainer one, into the same two lists."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..prompts import read_chat_template
from ..reading import load_yaml
from .benchmarks import DEFAULT_JUDGE
from .scoring.ranking import LIKELIHOODS
from .scoring.vqa import NORMALISERS


logger = logging.get_logger(__name__)

# the benchmarks of 2023 -> our tasks for lmms-eval; other names are lmms-eval's own tasks
TASKS = {
    "magnifierbench": ("otter_magnifierbench", "otter_magnifierbench_freeform"),
    "mmbench": ("otter_mmbench",),
    "mme": ("otter_mme",),
    "mathvista": ("otter_mathvista",),
    "mmvet": ("otter_mmvet",),
    "seedbench": ("otter_seedbench_ppl",),
    "seedbench_official": ("otter_seedbench_ppl_official",),
    "pope": ("otter_pope",),
    "scienceqa": ("otter_scienceqa",),
}
# those that rank answers by their log-probabilities
RANKED = ("seedbench", "seedbench_official", "imagenet", "hateful_memes")
FEWSHOT = ("coco", "flickr30k", "vqav2", "ok_vqa", "vizwiz", "textvqa", "imagenet", "hateful_memes")

# model keys of 2023 -> default checkpoint and how it generated; Idefics sampled, ours decodes greedily
_KEYS_OF_2023: dict[str, tuple[str | None, dict[str, Any]]] = {
    "otter_image": ("luodian/OTTER-Image-MPT7B", {"max_new_tokens": 512, "num_beams": 3, "no_repeat_ngram_size": 3}),
    "otter_video": (
        "luodian/OTTER-Video-LLaMA7B-DenseCaption",
        {"max_new_tokens": 512, "num_beams": 3, "no_repeat_ngram_size": 3},
    ),
    "otterhd": ("Otter-AI/OtterHD-8B", {"max_new_tokens": 256}),
    "fuyu": ("adept/fuyu-8b", {"max_new_tokens": 256}),
    "idefics": ("HuggingFaceM4/idefics-9b-instruct", {"max_new_tokens": 768}),
    "flamingo": (None, {}),
}
_DROPPED_MODELS = ("video_chat", "video_chatgpt", "llama_adapter", "mplug_owl", "frozen_bilm")
# Fuyu, unlike OtterHD, was asked without roles
_FUYU_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}{% endfor %}\n\x04"
)
# the 2023 evaluation put a space behind "User:", which OtterHD was trained without
_OTTERHD_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] != 'text' %}|SPEAKER|{% endfor %}User: "
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} Assistant:\x04"
    "{% else %} {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
)
_TEMPLATES_OF_2023 = {"fuyu": _FUYU_TEMPLATE, "otterhd": _OTTERHD_TEMPLATE}
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_DTYPES_OF_2023 = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# what `generate` takes of what is asked for; the latter where it samples
GENERATION = ("max_new_tokens", "num_beams", "no_repeat_ngram_size", "length_penalty", "repetition_penalty")
SAMPLING = ("temperature", "top_p", "top_k")
_MODEL_OPTIONS = ("dtype", "device", "load_in_4bit", "processor", "tokenizer", "tokenizer_reference", "chat_template")
_MODEL_OPTIONS += ("processor_kwargs", "generation", "media_store", "media_store_gb")
_MODEL_KEYS = {"path", "model_path", "name", "batch_size", "batch", "endpoint", "model", "resolution", *_MODEL_OPTIONS}
_MODEL_KEYS |= {"load_bit", "cuda_id", "max_new_tokens"}
_SAME_KEYS = (("path", "model_path"), ("dtype", "load_bit"), ("device", "cuda_id"), ("batch_size", "batch"))
_ENDPOINT_KEYS = {"endpoint", "model", "name", "batch_size", "batch", "generation", "max_new_tokens"}
# what OpenAI's protocol has of `generation`
_ENDPOINT_GENERATION = ("max_new_tokens", "temperature", "top_p")
_UNUSED_DATASET_KEYS = {"default_output_path", "version", "batch_size", "batch", "decimail_places", "cache_dir"}
_UNUSED_DATASET_KEYS |= {"debug"}
_PROMPT_KEYS = ("prompt", "sys_prompt", "shot_type")
_READING_KEYS = ("num_run", "quick_extract", "legacy_parse", "shot_type", "likelihood")
_DATASET_KEYS = {"name", "data_path", "image_dir", "split", "limit", "gpt_model", *_PROMPT_KEYS, *_READING_KEYS}
# benchmark -> which keys it has beside those of all
_OWN_KEYS = {
    "magnifierbench": ("prompt", "gpt_model", "legacy_parse"),
    "mmbench": ("sys_prompt",),
    "mme": ("prompt",),
    "mathvista": ("gpt_model", "quick_extract", "shot_type"),
    "mmvet": ("gpt_model", "num_run"),  # whose prompt in 2023 was the judge's
    "seedbench": ("likelihood",),
    "seedbench_official": ("likelihood",),
    "pope": ("prompt",),
    "scienceqa": ("prompt",),
}
_FEWSHOT_KEYS = {"name", "train", "test", "shots", "seeds", "num_samples", "query_set_size", "image_dir", "columns"}
_FEWSHOT_KEYS |= {"demonstrations", "encoder", "class_names", "batch_size", "limit", "likelihood", "normaliser"}
_FEWSHOT_KEYS |= {"train_split", "test_split"}
# few-shot data sets that have these keys
_OWN_FEWSHOT_KEYS = {
    "normaliser": ("vqav2", "ok_vqa", "vizwiz", "textvqa"),
    "class_names": ("imagenet",),
    "likelihood": ("imagenet", "hateful_memes"),
}
_JUDGE_KEYS = {"model", "max_retries", "options"}
# what keys hold, in types and in words; those of numbers are looked at where they are read
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("name", "path", "model_path", "endpoint", "model", "dtype", "load_bit"), ((str,), "a text")),
    **dict.fromkeys(("processor", "tokenizer", "chat_template", "media_store", "output"), ((str,), "a text")),
    **dict.fromkeys(("data_path", "image_dir", "split", "train_split", "test_split"), ((str,), "a text")),
    **dict.fromkeys(("gpt_model", "demonstrations", "encoder", *_PROMPT_KEYS), ((str,), "a text")),
    **dict.fromkeys(("load_in_4bit", "legacy_parse", "quick_extract", "controls"), ((bool,), "true or false")),
    **dict.fromkeys(("processor_kwargs", "generation", "columns", "options"), ((Mapping,), "a mapping")),
    **dict.fromkeys(("train", "test"), ((str, Mapping), "a text, or a mapping of two files")),
    "class_names": ((str, list), "a list, or a file"),
    "tokenizer_reference": ((str, float), "4.28 or 4.35"),
    "device": ((str, int), "a text"),
}
_TOP_KEYS = {"models", "datasets", "output", "limit", "judge", "training_data", "controls"}


@dataclass
class ModelSpec:
    """A model to evaluate: a transformers `path`, or `model` behind an `endpoint`, with `options`."""

    name: str
    path: str | None = None
    endpoint: str | None = None
    model: str | None = None
    batch_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DatasetSpec:
    """A benchmark to run; `tasks` are names of lmms-eval, and `fewshot` the settings of the few-shot harness."""

    name: str
    tasks: tuple[str, ...] = ()
    data_path: str | None = None
    image_dir: str | None = None
    split: str | None = None
    limit: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    judge: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fewshot: dict[str, Any] | None = None


@dataclass
class EvalConfig:
    """
    What to evaluate, the folder for the results, and the training YAML whose data the rows are looked for in; with
    `controls` every question is asked with the picture of another row and with a blank one, too.
    """

    models: list[ModelSpec]
    datasets: list[DatasetSpec]
    output: Path = Path("logs/evaluation")
    controls: bool = False
    judge_retries: int = 5
    judge_options: dict[str, Any] = field(default_factory=dict)
    training_data: str | None = None


def load_config(path: str | Path) -> EvalConfig:
    """
    Reads a configuration file; see `docs/evaluation.md`.

    Raises:
        ValueError: for what is not such a file: the field, what it holds and what it may hold. Keys (`api_key`) are
            refused: they are read from the environment only, and never written anywhere.
        OSError: if there is no such file.
    """
    raw = load_yaml(path)
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} must hold `models:` and `datasets:`.")
    _check_keys(raw, _TOP_KEYS, "the configuration")
    for name in ("models", "datasets"):
        if not isinstance(raw.get(name), list) or not raw[name]:
            raise ValueError(f"{path}: `{name}` must be a list of at least one, got {raw.get(name)!r:.80}.")
    judge = raw.get("judge") or {}
    judge = _check_keys({"model": judge} if isinstance(judge, str) else judge, _JUDGE_KEYS, "`judge`")
    output = Path(raw.get("output") or "logs/evaluation")
    config = EvalConfig(
        models=[_read_model(entry) for entry in raw["models"]],
        datasets=[_read_dataset(entry, raw.get("limit"), judge.get("model")) for entry in raw["datasets"]],
        # 2023 wrote a text file
        output=output.with_suffix("") if output.suffix == ".txt" else output,
        controls=bool(raw.get("controls")),
        judge_retries=whole_number(judge.get("max_retries", 5), "max_retries", least=0),
        judge_options=dict(judge.get("options") or {}),
        training_data=raw.get("training_data"),
    )
    if config.training_data is not None and not isinstance(config.training_data, str):
        raise ValueError(f"{path}: `training_data` must be a training YAML, got {config.training_data!r:.80}.")
    for kind, specs in (("model", config.models), ("dataset", config.datasets)):
        # as their results are called
        names = [file_name(spec.name) for spec in specs]
        if len(set(names)) < len(names):
            twice = next(spec.name for spec, name in zip(specs, names, strict=True) if names.count(name) > 1)
            raise ValueError(f"Two {kind}s are called {twice!r}: give one of them another `name`.")
    return config


def _read_model(entry) -> ModelSpec:
    entry = _check_keys({"path": entry} if isinstance(entry, str) else entry, _MODEL_KEYS, "a model")
    name = entry.get("name")
    for key, old in _SAME_KEYS:
        if key in entry and old in entry:
            raise ValueError(
                f"A model has `{key}` {entry[key]!r:.80} and `{old}` {entry[old]!r:.80}: give one of them."
            )
    if name in _DROPPED_MODELS:
        raise ValueError(
            f"The model {name!r} needs a repository of 2023 that is not part of this package; give a path."
        )
    batch_size = whole_number(entry.get("batch_size", entry.get("batch", 1)), "batch_size")
    if "endpoint" in entry or name == "gpt4v":
        return _read_endpoint(entry, batch_size)

    checkpoint, generation = _KEYS_OF_2023.get(name, (None, {}))
    path = entry.get("path") or entry.get("model_path") or checkpoint
    if path is None:
        known = ", ".join(_KEYS_OF_2023)
        raise ValueError(f"A model needs a `path` (folder or Hub id), or one of the names {known}; got {entry!r}.")
    if entry.get("model") is not None:
        raise ValueError(f"`model` is {entry['model']!r}, a name for an `endpoint`, and {path} is none: take it out.")
    if "path" in entry:
        generation = {}  # the plain form: as each benchmark asks
    options = {key: entry[key] for key in _MODEL_OPTIONS if entry.get(key) is not None}
    _check_media_store(options)
    if "chat_template" in options:
        options["chat_template"] = read_chat_template(options["chat_template"])
    if generation := _generation_of(entry, generation):
        options["generation"] = generation
    if entry.get("resolution", -1) not in (None, -1):
        resolution = whole_number(entry["resolution"], "resolution")
        options["processor_kwargs"] = {**options.get("processor_kwargs", {}), "resolution": resolution}
    if dtype := entry.get("dtype", entry.get("load_bit")):
        options["dtype"] = _DTYPES_OF_2023.get(dtype, dtype)
        if options["dtype"] not in _DTYPES:
            raise ValueError(f"A model has dtype {dtype!r:.80}; use {', '.join(_DTYPES)}, or `load_in_4bit: true`.")
    if "cuda_id" in entry:
        options["device"] = f"cuda:{entry['cuda_id']}"
    if name in _TEMPLATES_OF_2023 and "path" not in entry:
        options.setdefault("chat_template", _TEMPLATES_OF_2023[name])
    return ModelSpec(name or _short(path), path, batch_size=batch_size, options=options)


def _read_endpoint(entry: Mapping, batch_size: int) -> ModelSpec:
    name = entry.get("name")
    model = entry.get("model", "gpt-4-vision-preview" if name == "gpt4v" else None)
    if model is None:
        raise ValueError(f"The endpoint {entry['endpoint']!r} needs `model`, the name it knows the model by.")
    if given := sorted(key for key in entry.keys() - _ENDPOINT_KEYS if entry[key] is not None):
        raise ValueError(
            f"The model {model!r} is behind an endpoint, which is not told `{'`, `'.join(given)}`: leave that to "
            "its server."
        )
    generation = _generation_of(entry, {})
    if given := [key for key in generation if key not in _ENDPOINT_GENERATION]:
        raise ValueError(
            f"`generation` of {model!r} has `{given[0]}`, which its endpoint is not told: it knows "
            f"{', '.join(_ENDPOINT_GENERATION)}."
        )
    options = {"generation": generation} if generation else {}
    return ModelSpec(name or _short(model), None, entry.get("endpoint", ""), model, batch_size, options)


def _generation_of(entry: Mapping, default: Mapping) -> dict[str, Any]:
    """What a model's entry says of all its answers."""
    given, longest = entry.get("generation", {}), entry.get("max_new_tokens")
    if longest is not None and given.get("max_new_tokens", longest) != longest:
        raise ValueError(
            f"A model has `max_new_tokens` {longest!r:.80}, and another in `generation`: give one of them."
        )
    limit = {} if longest is None else {"max_new_tokens": whole_number(longest, "max_new_tokens")}
    return check_generation({**default, **limit, **given})


def check_generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of every answer, as they are.

    Raises:
        ValueError: for others than `GENERATION` and `SAMPLING`, for those of sampling where it is greedy, and for what
            says both.
    """
    known = ("do_sample", *GENERATION, *SAMPLING)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"`generation` has the unknown key `{unknown[0]}`; known are {', '.join(known)}.")
    if options.get("do_sample") is False and samples(options):
        raise ValueError(
            f"`generation` has temperature {options['temperature']!r}, which samples, and `do_sample: false`: take "
            "one of them out."
        )
    for name, all_tokens in (("top_p", 1), ("top_k", 0)):
        value = options.get(name)
        if value not in (None, all_tokens) and not samples(options):
            raise ValueError(
                f"`generation` has {name} {value!r}, which is for sampling: add a temperature above 0 or "
                "`do_sample: true`, or leave it out."
            )
    return dict(options)


def samples(options: Mapping[str, Any]) -> bool:
    """Whether answers with these options are drawn; otherwise they are greedy, or of beams."""
    return bool(options.get("do_sample")) or float(options.get("temperature") or 0) > 0


def _check_media_store(options: Mapping) -> None:
    gigabytes = options.get("media_store_gb", 0)
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, (int, float)) or not 0 <= gigabytes < math.inf:
        raise ValueError(f"`media_store_gb` is {gigabytes!r}; it must be a number from 0 on.")
    if "media_store_gb" in options and "media_store" not in options:
        raise ValueError("`media_store_gb` bounds a `media_store`, and there is none: add one, or leave it out.")


def _read_dataset(entry, limit, judge: str | None) -> DatasetSpec:
    entry = {"name": entry} if isinstance(entry, str) else entry
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"A dataset needs a `name`, e.g. mme; got {entry!r:.80}.")
    if name in FEWSHOT:
        return _read_fewshot(name, entry, limit)
    entry = _check_keys(entry, _DATASET_KEYS | _UNUSED_DATASET_KEYS, f"the dataset {name!r}")
    if "num_run" in entry:
        entry["num_run"] = whole_number(entry["num_run"], "num_run")
    _say_unused(name, entry, _UNUSED_DATASET_KEYS)
    if name not in TASKS and (fixed := sorted(entry.keys() - {"name", "limit"} - _UNUSED_DATASET_KEYS)):
        raise ValueError(
            f"The dataset {name!r} is a task of lmms-eval, whose `{fixed[0]}` is fixed; for other data write a task "
            "(docs/evaluation.md)."
        )
    for key in ("gpt_model", *_PROMPT_KEYS, *_READING_KEYS):
        if key in entry and key not in _OWN_KEYS.get(name, ()):
            of = ", ".join(other for other, keys in _OWN_KEYS.items() if key in keys)
            raise ValueError(f"The dataset {name!r} has `{key}`, which is for {of}: take it out.")
    if "image_dir" in entry and "data_path" not in entry:
        raise ValueError(f"The dataset {name!r} has `image_dir`, which is for the pictures of a `data_path`: add one.")
    if entry.get("likelihood", "mean") not in LIKELIHOODS:
        raise ValueError(
            f"The dataset {name!r} has likelihood {entry['likelihood']!r}; use {' or '.join(LIKELIHOODS)}."
        )
    limit = entry.get("limit", limit)
    return DatasetSpec(
        name,
        tasks=TASKS.get(name, (name,)),
        data_path=entry.get("data_path"),
        image_dir=entry.get("image_dir"),
        split=_split_of(entry),
        limit=None if limit is None else whole_number(limit, "limit"),
        prompts={key: entry[key] for key in _PROMPT_KEYS if key in entry},
        judge=entry.get("gpt_model") or judge or DEFAULT_JUDGE,
        options={key: entry[key] for key in _READING_KEYS if key in entry},
    )


def _split_of(entry: Mapping) -> str | None:
    split = entry.get("split")
    if entry.get("data_path", "").startswith("Otter-AI/"):
        # the copies of 2023, whose code took test unless told otherwise, and called validation dev
        split = split or "test"
        return "validation" if split == "dev" else split
    return split


def _read_fewshot(name: str, entry, limit) -> DatasetSpec:
    entry = _check_keys(entry, _FEWSHOT_KEYS, f"the few-shot dataset {name!r}")
    for key in ("train", "test"):
        if key not in entry:
            raise ValueError(f"The few-shot dataset {name!r} needs `{key}`: a file or Hub id.")
    for key, names in _OWN_FEWSHOT_KEYS.items():
        if key in entry and name not in names:
            raise ValueError(f"The dataset {name!r} has `{key}`, which is for {', '.join(names)}: take it out.")
    way, encoder = entry.get("demonstrations", "random"), entry.get("encoder")
    if way not in ("random", "fixed", "rices") or (way == "rices") != bool(encoder):
        raise ValueError(
            "`demonstrations` must be random, fixed, or rices with an `encoder` (folder or Hub id of a vision "
            f"encoder); {name} has {way!r} and {encoder!r}."
        )
    for key, known in (("likelihood", LIKELIHOODS), ("normaliser", NORMALISERS)):
        if entry.get(key, known[0]) not in known:
            raise ValueError(f"The dataset {name!r} has {key} {entry[key]!r}; use {' or '.join(known)}.")
    for key, least in (("shots", 0), ("seeds", None)):
        if not isinstance(entry.get(key, [0]), list) or entry.get(key) == []:
            raise ValueError(f"`{key}` is {entry[key]!r:.80}; it must be a list of whole numbers, e.g. [0, 4, 8].")
        if key in entry:
            entry[key] = [whole_number(number, key, least) for number in entry[key]]
    _say_unused(name, entry, {"batch_size"})
    settings = {key: value for key, value in entry.items() if key not in ("name", "limit", "batch_size")}
    settings.setdefault("num_samples", entry.get("limit", limit))
    for key in ("num_samples", "query_set_size"):
        if settings.get(key) is not None:
            settings[key] = whole_number(settings[key], key)
    return DatasetSpec(name, fewshot=settings)


def _say_unused(name: str, entry: Mapping, unused: set[str]) -> None:
    if found := sorted(unused & entry.keys()):
        logger.warning(
            f"Dataset {name!r}: {', '.join(found)} has no effect any more; models have a `batch_size`, and all "
            "results and replies go to `output`."
        )


def whole_number(value, name: str, least: int | None = 1) -> int:
    """A setting as a whole number; ValueError, calling it `name`, if it is none, or below `least`."""
    try:
        number = None if isinstance(value, bool) else int(value)
        number = None if isinstance(value, float) and value != number else number
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (least is not None and number < least):
        limit = "" if least is None else f" from {least} on"
        raise ValueError(f"`{name}` is {value!r:.80}; it must be a whole number{limit}.")
    return number


def _check_keys(entry, known: set[str], what: str) -> dict[str, Any]:
    """The mapping, with keys that are known and values of their kinds; None stands for a key that is not there."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{what} is {entry!r:.80}; write a name, or a mapping of {', '.join(sorted(known))}.")
    secrets = sorted(key for key in entry if "api_key" in str(key) or "token" == str(key))
    if secrets:
        raise ValueError(
            f"{what} has `{secrets[0]}`: keys do not belong into files. Remove it (and renew the key if the file was "
            "shared) and set OPENAI_API_KEY in the environment."
        )
    if unknown := sorted(set(map(str, entry)) - known):
        raise ValueError(f"{what} has the unknown key `{unknown[0]}`; known are {', '.join(sorted(known))}.")
    for key in entry.keys() & _KINDS.keys():
        value, (kinds, words) = entry[key], _KINDS[key]
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{what} has {key} {value!r:.80}; it must be {words}.")
    as_text = ("tokenizer_reference",)  # which YAML takes for a number
    return {key: str(value) if key in as_text else value for key, value in entry.items() if value is not None}


def file_name(name: str) -> str:
    """A name of a model or data set as that of its folder."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _short(path: str) -> str:
    name = Path(path).name
    return name if name.strip(".") else Path(path).resolve().name  # of `.` and `..`
