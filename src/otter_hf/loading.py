"""Where folders and repositories of models are read, for chat, server, evaluation and training alike."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    IdeficsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.distributed.utils import is_local_dist_rank_0
from transformers.image_utils import SizeDict
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.modeling_utils import LoadStateDictConfig, set_zero3_state
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

import otter_hf  # noqa: F401  registers the families

from .conversion.tensors import check_weights, refuse_lfs_pointers, weight_files
from .errors import config_told
from .films import DEFAULT_NUM_FRAMES, check_sampling
from .model_names import check_model_name, split_revision
from .models.attention_choice import read_attention
from .models.flamingo import FlamingoConfig, FlamingoProcessor
from .models.generation import end_tokens
from .models.legacy import find_raw_config, is_legacy_config
from .models.legacy_tokens import load_tokenizer
from .models.offloading import default_device
from .models.otter import OtterConfig
from .models.otterhd import OtterHDConfig, OtterHDProcessor
from .models.quantization import quantization_config
from .models.stored_sizes import refuse_impossible, refuse_other_sizes
from .prompts import RESERVED_TOKENS, read_chat_template
from .prompts import chat_template as format_chat_template


# with these Idefics was trained: its fast tokenizer dropped no blank
IDEFICS_REFERENCE = "4.35"
_MOST_SIDE = 1 << 14
# by which processors enlarge pictures; those of other families mean other things by such names: Qwen2-VL counts pixels
_SIDES = {
    FlamingoProcessor: ("size", "crop_size"),
    OtterHDProcessor: ("resolution",),  # its `size` is a limit
    IdeficsProcessor: ("image_size",),
}
# transformers 5.23 leaves the end of this name out when it reads a DoRA adapter
_DORA = WeightRenaming(r"(\.lora_magnitude_vector\.[^.]+)$", r"\1.weight")
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
_PROCESSOR_FILES = "processor_config.json, tokenizer_config.json or config.json"


def load(
    name: str,
    *,
    tokenizer: str | None = None,
    tokenizer_reference: str | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model and its processor; see `load_model` and `load_processor` for arguments and errors."""
    processor = load_processor(name, tokenizer, chat_template, tokenizer_reference)
    return load_model(name, tokenizer=tokenizer, **options), processor


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | torch.device | None = None,
    load_in_4bit: bool = False,
    tokenizer: str | None = None,
    attn_implementation: str | dict[str, str] | None = None,
) -> PreTrainedModel:
    """
    An image-text-to-text model for inference.

    Args:
        name: folder or Hub id; a revision may follow an `@`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`, or torch's.
        device_map: a device, or `auto` to spread over devices; by default the accelerator if there is one.
        load_in_4bit: quantise with bitsandbytes (NF4).
        tokenizer: folder or Hub id of the tokenizer, for an Otter or Flamingo repository of 2023 that has none.
        attn_implementation: a name, or names by part; as `from_pretrained` takes them, or as typed in a command.

    Raises:
        ValueError: if bitsandbytes is missing, for a dtype or device that there is not, and for a tokenizer that is
            given for a model of another family.
        OSError: if there is no such model.
    """
    loading = {"quantization_config": quantization_config()} if load_in_4bit else {}
    if attn_implementation is not None:
        loading["attn_implementation"] = read_attention(attn_implementation)
    device_map = default_device() if device_map is None else device_map
    _check_place(dtype, device_map)
    model = read_model(name, tokenizer, dtype=dtype, device_map=device_map, **loading).eval()
    # an answer ends with <|endofchunk|>, which not every repository of 2023 says
    end_of_chunk = getattr(model.config, "end_of_chunk_token_id", None)
    if end_of_chunk is not None:
        model.generation_config.eos_token_id = sorted({*end_tokens(model.generation_config), end_of_chunk})
    return model


def _check_place(dtype: str | torch.dtype, device_map: Any) -> None:
    """ValueError for what there is not, before a configuration is blamed for it."""
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown: use auto, float32, bfloat16 or float16.")
    if isinstance(device_map, (str, torch.device)) and device_map not in _PLACEMENTS:
        try:
            torch.empty(0, device=device_map)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"The device {str(device_map)!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}."
            ) from error


@contextmanager
def _installed(name: str) -> Iterator[None]:
    """ValueError for attention, quantisation or a processor of other families that needs what is not installed."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{name} cannot be loaded: {' '.join(str(error).split()):.300}") from error


def read_model(name: str, tokenizer: str | None = None, **options: Any) -> PreTrainedModel:
    """
    A model as `from_pretrained` reads it with these options; see `load_model` for arguments and errors.

    Raises:
        ValueError: if weights of it, or of the model that an adapter is for, are damaged, NaN or infinite, or not all
            there: `from_pretrained` would fill them up at random.
    """
    path, revision = _locate(name, weights=True)
    base = _base_of_adapter(path, revision)
    try:
        if base is None:
            options |= _tokenizer_options(path, revision, tokenizer=tokenizer)
            with _installed(name), config_told(name):
                _refuse_sizes(path, **options)
                model, told = AutoModelForImageTextToText.from_pretrained(
                    path, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )
        else:
            # in two steps, since `from_pretrained` tells of the adapter's weights only
            model = read_model(base, tokenizer or _tokenizer_for(base, path), **options)
            loading = LoadStateDictConfig(
                ignore_mismatched_sizes=True,
                download_kwargs={"revision": revision},
                weight_mapping=[*get_model_conversion_mapping(model), _DORA],
            )
            told = _load_adapter(model, path, loading)
            refuse_left_over(name, told)
    except (SafetensorError, UnpicklingError) as error:
        raise ValueError(f"The weights of {name} are damaged ({error}): fetch them again.") from error
    refuse_incomplete(name, told)
    refuse_no_numbers(name, model)
    refuse_integers(path, model)
    return model


def _refuse_sizes(
    path: str, config: PreTrainedConfig | None = None, tokenizer: str | None = None, **others: Any
) -> None:
    """`refuse_other_sizes`, which our models call, for those of others, and under ZeRO-3, which takes memory first."""
    if not Path(path).is_dir():
        return
    raw, _ = PreTrainedConfig.get_config_dict(path)
    ours = (FlamingoConfig.model_type, OtterConfig.model_type, OtterHDConfig.model_type)
    if (raw.get("model_type") in ours and not is_deepspeed_zero3_enabled()) or "quantization_config" in raw:
        return
    if config is None:
        config = AutoConfig.from_pretrained(path, **({"tokenizer": tokenizer} if tokenizer else {}))
    with torch.device("meta"), set_zero3_state():
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    loading = LoadStateDictConfig(
        pretrained_model_name_or_path=path, weight_mapping=get_model_conversion_mapping(model)
    )
    refuse_other_sizes(model, None, weight_files(path), loading)


def _base_of_adapter(path: str, revision: str) -> str | None:
    """The model that an adapter is for; None for a whole model. ValueError for an adapter that does not say it."""
    file = find_adapter_config_file(path, revision=revision)
    if file is None or Path(path, "config.json").is_file():
        return None
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its adapter_config.json is damaged, it names no base model: copy it again."
        ) from error
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{path} is an adapter whose adapter_config.json has the base_model_name_or_path {base!r:.80}: write the "
            "folder or Hub id of the model it was trained on there."
        )
    return base


def _tokenizer_for(base: str, path: str) -> str | None:
    """The folder of an adapter, for a base of 2023 that holds no tokenizer, if there is one in it."""
    base, revision = _locate(base)  # or says what is wrong with it
    is_there = Path(path, "tokenizer.json").is_file() and is_legacy_config(find_raw_config(base, revision=revision))
    return path if is_there else None


def _load_adapter(model: PreTrainedModel, path: str, loading: LoadStateDictConfig) -> dict:
    try:
        _refuse_rank(Path(path))
        return model.load_adapter(path, load_config=loading).to_dict()
    except (AttributeError, KeyError, TypeError) as error:  # of PEFT, which believes what it reads
        raise ValueError(f"{path}: its adapter_config.json is damaged ({error!r:.80}): copy it again.") from error


def _refuse_rank(folder: Path) -> None:
    """
    ValueError for a rank beyond all that an adapter's weights hold, as PEFT would make factors of that size first, and
    for a scale that is no number.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        return
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    rank = max((rank for rank in ranks if type(rank) is int), default=0)
    for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
        if isinstance(alpha, float) and not math.isfinite(alpha):
            raise ValueError(f"{folder} has the lora_alpha {alpha} in its adapter_config.json: copy it again.")
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        largest = max((size for name in tensors.keys() for size in tensors.get_slice(name).get_shape()), default=0)
    if rank > largest:
        raise ValueError(
            f"{folder} has the rank (r) {rank} in its adapter_config.json, but no size above {largest} in its "
            "weights: write their rank there, or copy it again."
        )


def refuse_integers(path: str, model: PreTrainedModel) -> None:
    """
    Raise ValueError for weights stored as integers in a folder, which `from_pretrained` takes for numbers as they are.

    Stored names may differ from those in the model; a parameter of that kind and shape is what they would become.
    """
    floating = {
        (name.rpartition(".")[2], tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                stored = tensors.get_slice(name)
                kind, shape = stored.get_dtype(), tuple(stored.get_shape())
                if kind.startswith(("I", "U")) and (name.rpartition(".")[2], shape) in floating:
                    raise ValueError(
                        f"{file} holds {name} as {kind}, where the model has floating-point numbers: fetch or convert "
                        "it again."
                    )


def refuse_no_numbers(name: str, model: PreTrainedModel) -> None:
    """Raise ValueError, with names, for weights that are NaN or infinite: no answer would mean anything."""
    if is_fsdp_enabled() and not is_local_dist_rank_0():
        return  # its memory is filled by the first process later
    broken = []
    for key, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta:  # what is left on the disk is not looked at
            # one pass without a copy; a sum of large numbers may overflow
            if not tensor.detach().sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
                broken.append(key)
    if broken:
        raise ValueError(f"{name} has values that are NaN or infinite in {_some(broken)}: fetch or convert it again.")


def refuse_incomplete(name: str, told: dict) -> None:
    """Raise ValueError, with names, if the `output_loading_info` of `from_pretrained` tells of weights made up."""
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{name} lacks {_some(missing)}, which would be random numbers: its weights are not all there or are of "
            "another model; fetch or convert it again."
        )
    if mismatched := sorted(told["mismatched_keys"]):
        shapes = [f"{key} as {list(stored)} for {list(wanted)}" for key, stored, wanted in mismatched]
        raise ValueError(
            f"{name} holds {_some(shapes)}, which would be random numbers: weights and config.json do not belong "
            "together."
        )


def refuse_left_over(name: str, told: dict) -> None:
    """Raise ValueError if weights of an adapter found no place in its base."""
    if unexpected := sorted(told["unexpected_keys"]):
        raise ValueError(
            f"{name} is an adapter with {_some(unexpected)}, for which its base model has no place: it belongs to "
            "another model."
        )


def _some(names: list[str]) -> str:
    """Up to three of the names, and how many there are more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def read_config(name: str, tokenizer: str | None = None) -> PreTrainedConfig:
    """The configuration of a model; see `load_model` for arguments and errors. ValueError for an adapter."""
    path, revision = _locate(name)
    if (base := _base_of_adapter(path, revision)) is not None:
        raise ValueError(f"{name} is an adapter for {base}, no whole model: merge the two first, or name that one.")
    options = _tokenizer_options(path, revision, tokenizer=tokenizer)
    with config_told(name):
        return AutoConfig.from_pretrained(path, revision=revision, **options)


def read_processor(name: str, tokenizer: str | None = None, tokenizer_reference: str | None = None) -> ProcessorMixin:
    """The processor of a model as it is stored, with the tokens of 2023; see `load_processor`."""
    path, revision = _locate(_with_processor(name))
    config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    if config.get("model_type") != "idefics":
        options = _tokenizer_options(path, revision, tokenizer=tokenizer, tokenizer_reference=tokenizer_reference)
        with _installed(name), config_told(name, _PROCESSOR_FILES):
            processor = AutoProcessor.from_pretrained(path, revision=revision, **options)
        _refuse_large_pictures(name, processor)
        return processor
    _tokenizer_options(path, revision, tokenizer=tokenizer)
    # Idefics' image processor cannot do without torchvision unless told to
    with config_told(name, _PROCESSOR_FILES):
        processor = AutoProcessor.from_pretrained(path, revision=revision, backend="pil")
    of_2023 = config.get("transformers_version", "4.").startswith("4.")
    if of_2023 or tokenizer_reference is not None:
        reference = tokenizer_reference or IDEFICS_REFERENCE
        processor.tokenizer = load_tokenizer(path, legacy=of_2023, reference=reference, revision=revision)
    else:  # the tokenizer keeps that word as its own backend, and passes for a slow one
        processor.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    _refuse_large_pictures(name, processor)
    return processor


def _with_processor(name: str) -> str:
    """The model itself, or of an adapter that holds no processor, as PEFT saves them, the model that it is for."""
    path, revision = _locate(name)
    base = _base_of_adapter(path, revision)
    if base is None or cached_file(
        path, PROCESSOR_NAME, revision=revision, _raise_exceptions_for_missing_entries=False
    ):
        return name
    return _with_processor(base)


def read_num_frames(name: str) -> int:
    """How many frames of a film a model is shown where nobody says: as many as in training, if it tells, else 16."""
    path, revision = split_revision(_with_processor(name))
    file = cached_file(path, PROCESSOR_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    try:
        told = json.loads(Path(file).read_text(encoding="utf-8")).get("num_frames") if file else None
        check_sampling(told, None, None)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name} cannot be used, a value in its {PROCESSOR_NAME} is wrong: {error}") from error
    return told or DEFAULT_NUM_FRAMES


def _refuse_large_pictures(name: str, processor: ProcessorMixin) -> None:
    """ValueError for a processor that would enlarge pictures beyond what memory holds, each of them."""
    images = getattr(processor, "image_processor", None)
    for field in next((fields for kind, fields in _SIDES.items() if isinstance(processor, kind)), ()):
        value = getattr(images, field, None)
        sides = dict(value).values() if isinstance(value, (dict, SizeDict)) else [value]
        if largest := max((side for side in sides if isinstance(side, int) and side > _MOST_SIDE), default=0):
            raise ValueError(
                f"{name} cannot be used: {field} is {largest} in its processor_config.json, and pictures are made of "
                f"at most {_MOST_SIDE} pixels a side: write what its config.json has."
            )


def load_processor(
    name: str,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    tokenizer_reference: str | None = None,
) -> ProcessorMixin:
    """
    The processor of a model, with a chat template.

    Args:
        name, tokenizer: as for `load_model`.
        chat_template: a Jinja file, or the name of an instruction format, in place of the processor's own template.
        tokenizer_reference: for a LLaMA tokenizer of 2023, see [`FlamingoProcessor.from_pretrained`].

    Raises:
        ValueError: if the processor has no chat template and none is given. A Flamingo without one is prompted as
            OpenFlamingo was: picture, text.
        OSError: if there is no such processor or template.
    """
    processor = read_processor(name, tokenizer, tokenizer_reference)
    if chat_template is not None:
        processor.chat_template = read_chat_template(
            chat_template, getattr(processor, "reserved_tokens", RESERVED_TOKENS)
        )
    elif processor.chat_template is None and isinstance(processor, FlamingoProcessor):
        processor.chat_template = format_chat_template("plain", processor.reserved_tokens)
    elif processor.chat_template is None:
        raise ValueError(f"The processor of {name} has no chat template: give a Jinja file as the chat template.")
    return processor


def _tokenizer_options(path: str, revision: str, **options: str | None) -> dict:
    """The keyword arguments of `from_pretrained` that were given, which not every family has."""
    stated = {name: value for name, value in options.items() if value is not None}
    if "tokenizer" in stated:
        check_model_name(stated["tokenizer"], "tokenizer", config=False)
    if stated:
        if (base := _base_of_adapter(path, revision)) is not None:
            path, revision = split_revision(base)
        model_type = PreTrainedConfig.get_config_dict(path, revision=revision)[0].get("model_type")
        if model_type not in (FlamingoConfig.model_type, OtterConfig.model_type):
            given = " and ".join(f"{name} {value}" for name, value in stated.items())
            raise ValueError(f"{given} was given, but {path} is of type {model_type}, which has its own tokenizer.")
    return stated


def _locate(name: str, weights: bool = False) -> tuple[str, str]:
    """Path and revision of `path` or `path@revision`. ValueError unless it is a model, and a folder whole."""
    check_model_name(name, weights=weights)
    path, revision = split_revision(name)
    if Path(path).is_dir():
        check_weights(path) if weights else refuse_lfs_pointers(path)
        if Path(path, "config.json").is_file():
            refuse_impossible(PreTrainedConfig.get_config_dict(path)[0], path)
    return path, revision
