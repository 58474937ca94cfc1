"""
Attention masks that nothing is read from. transformers looks, in each forward pass, whether a mask hides anything at
all and whether a row is packed, to leave out the mask where it can; on CUDA the host waits for that.
"""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_torchdynamo_compiling


# decoders that find positions in the mask (OPT), know masks only (Falcon), or whose masks are not looked at (MPT)
_OWN_WAYS = ("falcon", "opt", "otter_mpt")


def mask_without_reading(
    config: PreTrainedConfig,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    shape: tuple[int, int],
    cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    The mask to hand to a decoder of transformers in place of `attention_mask`, where that spares it a look.

    Args:
        config: of the decoder.
        attention_mask: `(B, past + L)`, or None.
        past_key_values: the cache before this step.
        shape: B and L of the tokens at hand.
        cu_seq_lens: where packed samples begin and end.

    Returns:
        For a decoding step through torch's attention the mask `(B, 1, 1, K)`; for packed samples through the
        variable-length one, which takes no mask, an empty one, so that none of L x L is built; else the mask given.
    """
    implementation = config._attn_implementation
    if (
        implementation not in ("sdpa", "varlen_sdpa")
        or config.model_type in _OWN_WAYS
        or getattr(config, "sliding_window", None) is not None
        or is_torchdynamo_compiling()
    ):
        return attention_mask
    if cu_seq_lens is not None and attention_mask is None and past_key_values is None:
        return torch.empty(0, 0, 0, 0, device=cu_seq_lens.device) if implementation == "varlen_sdpa" else None
    # `generate` hands over finished masks too, by kind of layer
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    if shape[1] != 1 or past_key_values is None or not is_padding_mask:
        return attention_mask
    return create_causal_mask(
        config=config,
        inputs_embeds=attention_mask.new_empty(*shape, 1),  # for its shape and device
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=None,
        allow_is_causal_skip=False,
    )
