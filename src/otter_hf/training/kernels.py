"""Which kernels a training uses: those of attention, and Liger's (https://huggingface.co/papers/2410.10989)."""

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_liger_kernel_available

from ..extras import missing
from ..models.attention_choice import best_varlen_attention, read_attention
from .arguments import DataArguments, ModelArguments, TrainingArguments


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether the model is told where samples of a row begin, which OPT and transformers' Idefics are not."""
    return config.model_type != "idefics" and config.get_text_config().model_type != "opt"


def choose_attention(
    config: PreTrainedConfig, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> str | dict[str, str] | None:
    """
    `attn_implementation` as given, or else the one for the form of the batches; None leaves it to transformers, and so
    does a dict for parts that it does not name.

    Packed rows are for kernels that are told where a sample ends, see `best_varlen_attention`: flash attention where
    it is installed and the computation is in 16 bits, otherwise torch's own. A compiled graph takes one mask for the
    row.

    Raises:
        ValueError: for flash attention where the computation is in float32.
    """
    packing = can_pack(config) if data_args.packing is None else data_args.packing
    dtype = compute_dtype(config, model_args, training_args)
    if model_args.attn_implementation is not None or not packing or training_args.torch_compile:
        given = read_attention(model_args.attn_implementation)
        names = [str(name) for name in (given.values() if isinstance(given, dict) else [given])]
        if dtype == torch.float32 and (flash := next((name for name in names if "flash" in name), None)):
            raise ValueError(
                f"attn_implementation {flash} computes in 16 bits, but this training would in float32: set bf16 to "
                "true, or leave attn_implementation out."
            )
        return given
    kernel = best_varlen_attention(config, training_args.device, dtype)
    return {"": kernel, "text_config": kernel}


def compute_dtype(
    config: PreTrainedConfig, model_args: ModelArguments, training_args: TrainingArguments
) -> torch.dtype:
    """
    Precision of the multiplications: that of autocast, or of the weights; float32 between weights in 4 bits without
    autocast, as PEFT prepares such a model for training.
    """
    if training_args.bf16 or training_args.fp16:
        return torch.bfloat16 if training_args.bf16 else torch.float16
    if model_args.load_in_4bit:
        return torch.float32
    return config.dtype or torch.float32 if model_args.dtype == "auto" else getattr(torch, model_args.dtype)


def use_liger_kernels(config: PreTrainedConfig, options: dict[str, bool] | None = None) -> None:
    """
    Has models that are made from now on use Liger's kernels in their decoder.

    Replaces classes of transformers in this process, as Liger does it for models that are not made yet: what it does
    to a finished model looks for layers where a Flamingo has wrapped ones. A decoder it does not know stays as it is.
    The loss needs no call: `supervised_loss` takes Liger's fused kernel where it is installed.

    Args:
        options: which kernels, as `liger_kernel_config` of the training arguments.

    Raises:
        ValueError: without Liger or a CUDA device.
    """
    if not is_liger_kernel_available():
        raise ValueError(missing("use_liger_kernel", "liger"))
    if not torch.cuda.is_available():
        raise ValueError("use_liger_kernel needs a CUDA device: leave it out here.")
    from liger_kernel.transformers import _apply_liger_kernel

    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel(config.get_text_config().model_type, **{**(options or {}), **losses})
