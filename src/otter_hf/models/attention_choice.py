"""Which attention implementations there are on a machine, and which of them is best for a model."""

import difflib
import json

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available, logging

from .varlen_attention import has_varlen_kernel


logger = logging.get_logger(__name__)

# how to get each, and for which compute capabilities its kernels are made
_FLASH = {
    "flash_attention_4": ("pip install flash-attn-4", (9, 10)),
    "flash_attention_3": ("build flash_attn_interface from its source", (9, 9)),
    "flash_attention_2": ("pip install flash-attn, which compiles it", (8, 12)),
}


def _is_installed(name: str) -> bool:
    checks = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    return checks[name]()


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """
    Why an `attn_implementation` of flash attention cannot be used here, in words, or None if it can. All others are
    part of torch; for `varlen_sdpa` it is why its fused kernel is not used.
    """
    if device.type != "cuda":
        return "needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs bfloat16 or float16"
    if name == "varlen_sdpa":
        return None if has_varlen_kernel(device, dtype) else "needs torch 2.11 or newer and an Ampere GPU or newer"
    how, (first, last) = _FLASH[name]
    if not _is_installed(name):
        return f"not installed: {how}"
    major = torch.cuda.get_device_capability(device)[0]
    return None if first <= major <= last else f"not made for a GPU of compute capability {major}.x"


def read_attention(given: str | dict | None) -> str | dict | None:
    """
    `attn_implementation` as typed: a name, `part=name,...` or a JSON object, as transformers takes it in Python.

    Raises:
        ValueError: for JSON that is none.
    """
    if not isinstance(given, str) or not (given.lstrip().startswith("{") or "=" in given):
        return given
    if "{" not in given:
        return {part.strip(): name.strip() for part, _, name in (pair.partition("=") for pair in given.split(","))}
    try:
        return json.loads(given)
    except ValueError as error:
        raise ValueError(f"attn_implementation: {given!r} cannot be read: {error}.") from None


def check_parts(config: PreTrainedConfig, requested: str | dict | None) -> None:
    """
    Raise ValueError for an `attn_implementation` by part that names a part which the configuration does not have:
    transformers would ignore it.
    """
    if not isinstance(requested, dict):
        return
    parts = ["", *config.sub_configs]
    for name in requested:
        if name not in parts:
            close = difflib.get_close_matches(str(name), parts, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, parts))}."
            raise ValueError(f"attn_implementation: {config.model_type} has no part {name!r}; {hint}")


class AttentionByPart:
    """For a configuration of several parts: an `attn_implementation` by part has no others, see [`check_parts`]."""

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        check_parts(self, value)
        PreTrainedConfig._attn_implementation.fset(self, value)


def attention_for(model_class: type[PreTrainedModel], requested: str | None, part: str) -> str | None:
    """
    The `attn_implementation` of a part: what is requested, or `eager` for an architecture without it, which is said.

    Args:
        model_class: of the part.
        requested: None leaves the choice to transformers.
        part: its name, e.g. `vision_config`.
    """
    if requested == "varlen_sdpa" and not getattr(model_class, "_supports_varlen_sdpa", True):
        return "sdpa"
    declared = {"flash": "_supports_flash_attn", "flex": "_supports_flex_attn", "sdpa": "_supports_sdpa"}
    if all(kind not in (requested or "") or getattr(model_class, name) for kind, name in declared.items()):
        return requested
    logger.warning_once(
        f"attn_implementation {requested!r} is set on the parts that have it; {model_class.__name__} ({part}) has "
        "not, and takes 'eager'."
    )
    return "eager"


def fits(name: str, config: PreTrainedConfig) -> bool:
    """
    Whether flash attention of this version can compute the text model of a configuration: 3 and 4 know neither ALiBi
    nor dropout, and 4 no heads wider than 128.
    """
    text = config.get_text_config()
    if name == "flash_attention_2":
        return True
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    plain = text.model_type != "otter_mpt" and not getattr(text, "attention_dropout", 0.0)
    return plain and (name != "flash_attention_4" or width <= 128)


def best_varlen_attention(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """
    The best `attn_implementation` that is at hand for rows which hold several samples, or images of any number.

    Args:
        config: of a Flamingo, Otter or OtterHD.
        device, dtype: of the computation.

    Returns:
        The newest flash attention that is installed, made for the GPU and able to compute the model, or else
        `varlen_sdpa`: torch's own kernels.
    """
    for name in _FLASH:
        if why_not(name, device, dtype) is None and fits(name, config):
            return name
    return "varlen_sdpa"


def tell_choice(chosen: set[str], device: torch.device, dtype: torch.dtype) -> str:
    """What else there was, in a sentence, for the plan of a training; empty without a GPU."""
    if device.type != "cuda":
        return ""
    reasons = {name: why_not(name, device, dtype) for name in (*_FLASH, "varlen_sdpa")}
    kernel = "torch's variable-length kernel" if reasons["varlen_sdpa"] is None else "a call per sample"
    told = [f"varlen_sdpa is {kernel}"] if "varlen_sdpa" in chosen else []
    return "; ".join([*told, *(f"{name}: {reasons[name]}" for name in _FLASH if reasons[name] and name not in chosen)])
