"""
MPT and MosaicGPT decoder (MosaicML, 2023): pre-norm blocks, ALiBi instead of position embeddings, fused `Wqkv`, GELU,
usually no bias anywhere and the embedding matrix as output layer.

Written from the behaviour of MosaicML's and transformers' implementations, with the parameter names of the latter's
`MptForCausalLM`, so its checkpoints load as they are; those of MosaicGPT (MPT-1B RedPajama) load after
[`MOSAIC_GPT_RENAMES`]. Unlike transformers' own, it runs every attention implementation, any sequence length, packed
rows and `qk_ln`, and hands keyword arguments on to its blocks, which Flamingo's gated layers rely on.

Shapes: B rows, L tokens, D = `d_model`, H heads.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mpt import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, prepare_alibi_attention
from .configuration_mpt import OtterMptConfig


# MosaicGPT's parameter names -> MPT's, below any prefix: the `key_mapping` of `from_pretrained`, and the pairs of
# `WeightRenaming`s for `register_checkpoint_conversion_mapping`. Reversing them, to save, transformers 5.23 takes
# lookbehinds out of the names, and leaves `\b` in.
MOSAIC_GPT_RENAMES = {
    r"(?<!\w)ln_1\.": "norm_1.",
    r"(?<!\w)ln_2\.": "norm_2.",
    r"(?<!\w)mlp\.mlp_up\.": "ffn.up_proj.",
    r"(?<!\w)mlp\.mlp_down\.": "ffn.down_proj.",
    r"(?<!\w)ln_f\.": "norm_f.",
}


class OtterMptAttention(nn.Module):
    """Multi-head ALiBi self-attention with optional clipping of `Wqkv`'s output and layer norm of queries and keys."""

    def __init__(self, config: OtterMptConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.n_heads
        self.scaling = 1 / math.sqrt(self.head_dim) if config.softmax_scale is None else config.softmax_scale
        bias = not config.no_bias
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=bias)
        if config.qk_ln:
            self.q_ln = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=bias)
            self.k_ln = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=bias)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (B, L, D)` to the attended states `(B, L, D)` and, in eager, the weights `(B, H, L, K)`."""
        qkv = self.Wqkv(hidden_states)  # (B, L, 3 * D)
        if self.config.clip_qkv is not None:
            qkv = qkv.clamp(min=-self.config.clip_qkv, max=self.config.clip_qkv)
        query, key, value = qkv.chunk(3, dim=-1)  # (B, L, D) each
        if self.config.qk_ln:
            # under autocast a layer norm returns float32
            query = self.q_ln(query).to(value.dtype)
            key = self.k_ln(key).to(value.dtype)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (query, key, value)
        )  # (B, H, L, D / H) each
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            **kwargs,
        )  # (B, L, H, D / H)
        return self.out_proj(output.flatten(2)), weights  # (B, L, D)


class OtterMptMLP(nn.Module):
    """Feed-forward layer with exact GELU."""

    def __init__(self, config: OtterMptConfig):
        super().__init__()
        width = int(config.expansion_ratio * config.d_model)
        self.up_proj = nn.Linear(config.d_model, width, bias=not config.no_bias)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(width, config.d_model, bias=not config.no_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, L, D)` to `(B, L, D)`."""
        return self.down_proj(self.act(self.up_proj(hidden_states)))  # (B, L, D)


class OtterMptBlock(GradientCheckpointingLayer):
    """One decoder layer."""

    def __init__(self, config: OtterMptConfig, layer_idx: int):
        super().__init__()
        bias = not config.no_bias
        self.norm_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=bias)
        self.attn = OtterMptAttention(config, layer_idx)
        self.norm_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=bias)
        self.ffn = OtterMptMLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states (B, L, D)` to `(B, L, D)`; for the rest see `OtterMptModel.forward`."""
        attended, _ = self.attn(
            self.norm_1(hidden_states), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.resid_dropout(attended)
        return hidden_states + self.resid_dropout(self.ffn(self.norm_2(hidden_states)))  # (B, L, D)


class OtterMptPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization for the MPT family."""

    config: OtterMptConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OtterMptBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": OtterMptBlock, "attentions": OtterMptAttention}

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """
        As in the parent class, with MPT's weight names; `save_original_format=True` writes the names that the weights
        were read under, and those of a new model as MosaicGPT's.
        """
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class OtterMptModel(OtterMptPreTrainedModel):
    """The decoder without output layer. Its result lacks `logit_scale`, which belongs to the logits."""

    def __init__(self, config: OtterMptConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.emb_dropout = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList([OtterMptBlock(config, layer_idx) for layer_idx in range(config.n_layers)])
        self.norm_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon, bias=not config.no_bias)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module):
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): tokens; or give `inputs_embeds (B, L, D)`.
            attention_mask (`torch.Tensor` of shape `(B, past + L)`): 0 for padding, on either side.
            position_ids (`torch.LongTensor` of shape `(B, L)`): only tells samples packed into one row apart: a new
                one starts wherever positions do not go on by 1, if there is neither mask nor cache. ALiBi itself
                depends on distances alone.
            past_key_values ([`~transformers.Cache`]): keys and values of earlier tokens, extended in place.
            kwargs: handed on to every block.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; or if the attention
                implementation has no ALiBi bias.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, L, D)
        # Before a cache is made here: packed rows are told by the absence of the caller's.
        attention_mask, attention_kwargs = prepare_alibi_attention(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q")
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = self.emb_dropout(inputs_embeds)
        for block in self.blocks:
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **attention_kwargs,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm_f(hidden_states),  # (B, L, D)
            past_key_values=past_key_values,
        )


class OtterMptForCausalLM(OtterMptPreTrainedModel, GenerationMixin):
    """The decoder with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: OtterMptConfig):
        super().__init__(config)
        self.transformer = OtterMptModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(B, L)`): targets, shifted inside; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`): the last so many positions, or the positions themselves, to
                compute logits for; 0 for all.

        The other arguments are those of [`OtterMptModel.forward`].
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))  # (B, kept, vocabulary)
        if self.config.logit_scale is not None:
            logits = logits * self.config.logit_scale

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MOSAIC_GPT_RENAMES", "OtterMptForCausalLM", "OtterMptModel", "OtterMptPreTrainedModel"]
