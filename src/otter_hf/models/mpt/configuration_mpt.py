"""Configuration of the MPT decoder: MosaicML's MPT (2023) and its predecessor MosaicGPT (MPT-1B RedPajama).

Field names are MosaicML's, with the nested `attn_config` laid flat; transformers' standard names are aliases of them.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Options of MosaicML's code that change what the model computes, with the values this decoder implements.
_IMPLEMENTED = {
    "attn_type": ("multihead_attention",),
    "alibi": (True,),
    "prefix_lm": (False,),
    "attn_uses_sequence_id": (False,),
    "rope": (False,),
    "qk_gn": (False,),
    "kv_n_heads": (None,),
    "sliding_window_size": (-1, None),
    "embedding_fraction": (1, None),
    "norm_type": ("low_precision_layernorm", "layernorm"),
}

_ATTENTION_FIELDS = ("alibi_bias_max", "attn_pdrop", "clip_qkv", "qk_ln", "softmax_scale")

_MOSAIC_GPT_NAMES = {"mlp_ratio": "expansion_ratio", "attn_qk_ln": "qk_ln", "attn_clip_qkv": "clip_qkv"}

# Choices of implementation or initialization: the weights of a checkpoint mean the same whatever these say. ALiBi
# models ignore `learned_pos_emb`. `use_cache` was off in the releases; cached decoding is exact here.
_IRRELEVANT = frozenset(
    "attn_config attn_impl learned_pos_emb use_cache init_config init_device verbose param_init_fn "
    "init_div_is_residual init_std init_gain init_nonlinearity fan_mode emb_init_std emb_init_uniform_lim "
    "low_precision_layernorm tokenizer_name model_type auto_map architectures transformers_version".split()
)


@strict
class OtterMptConfig(PreTrainedConfig):
    r"""
    Configuration of [`OtterMptModel`]; the defaults are those of MPT-7B.

    Args:
        vocab_size (`int`): rows of the embedding matrix.
        d_model (`int`): width; alias `hidden_size`.
        n_heads (`int`): attention heads; must divide `d_model`; alias `num_attention_heads`.
        n_layers (`int`): decoder blocks; alias `num_hidden_layers`.
        expansion_ratio (`int` or `float`): feed-forward width divided by `d_model`.
        max_seq_len (`int`): training length, for information (ALiBi has no longest sequence); alias
            `max_position_embeddings`.
        layer_norm_epsilon (`float`): epsilon of every layer norm.
        no_bias (`bool`): whether linear layers and layer norms go without bias.
        alibi_bias_max (`int` or `float`): the shallowest head has the slope `2 ** -alibi_bias_max`
            ([ALiBi](https://huggingface.co/papers/2108.12409)).
        clip_qkv (`float`, *optional*): queries, keys and values are clamped to `[-clip_qkv, clip_qkv]`.
        softmax_scale (`float`, *optional*): factor of the attention scores; `1 / sqrt(d_model / n_heads)` if `None`.
        qk_ln (`bool`): whether queries and keys go through a layer norm over all of `d_model` (MPT-1B RedPajama).
        attn_pdrop (`float`): dropout on the attention weights.
        resid_pdrop (`float`): dropout on the output of the attention and of the feed-forward layer.
        emb_pdrop (`float`): dropout on the token embeddings.
        logit_scale (`float` or `str`, *optional*): factor of the logits; `"inv_sqrt_d_model"` is `1 / sqrt(d_model)`.
        initializer_range (`float`): standard deviation of freshly initialized weights.
        use_cache (`bool`): whether generation keeps keys and values.
        tie_word_embeddings (`bool`): whether the output layer is the embedding matrix, as in every MPT release.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: if `d_model` is no multiple of `n_heads`, or
            `logit_scale` is an unknown string.
    """

    model_type = "otter_mpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }
    base_model_fsdp_plan = {
        "wte": "free_full_weight",
        "blocks.*": "free_full_weight",
        "norm_f": "keep_full_weight",
    }

    vocab_size: int = 50432
    d_model: int = 4096
    n_heads: int = 32
    n_layers: int = 32
    expansion_ratio: int | float = 4
    max_seq_len: int = 2048
    layer_norm_epsilon: float = 1e-5
    no_bias: bool = True
    alibi_bias_max: int | float = 8
    clip_qkv: int | float | None = None
    softmax_scale: int | float | None = None
    qk_ln: bool = False
    attn_pdrop: int | float = 0.0
    resid_pdrop: int | float = 0.0
    emb_pdrop: int | float = 0.0
    logit_scale: int | float | str | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.logit_scale == "inv_sqrt_d_model":
            self.logit_scale = 1 / math.sqrt(self.d_model)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the validation that transformers runs on every config."""
        if self.d_model % self.n_heads != 0:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}).")
        if isinstance(self.logit_scale, str):
            raise ValueError(f"logit_scale is {self.logit_scale!r}; give a number, 'inv_sqrt_d_model' or None.")

    @classmethod
    def from_legacy(cls, config: dict) -> "OtterMptConfig":
        """
        Reads a 2023 config dictionary: MosaicML's `mpt` (options of the attention nested in `attn_config`), its
        predecessor `mosaic_gpt` (all flat), or the one that transformers' `MptConfig` writes.

        Args:
            config (`dict`): a parsed `config.json`, or the `text_config` of an Otter or Flamingo one. Not modified.

        Raises:
            ValueError: if the config asks for something this decoder does not compute, such as a multi-query or
                prefix-LM model, or ALiBi switched off.
        """
        attention = config.get("attn_config") or {}
        attention = {key: attention[key] for key in (*_ATTENTION_FIELDS, *_IMPLEMENTED) if key in attention}
        options = {
            _MOSAIC_GPT_NAMES.get(key, key): value
            for key, value in {**config, **attention}.items()
            if key not in _IRRELEVANT
        }
        for name, implemented in _IMPLEMENTED.items():
            value = options.pop(name, implemented[0])
            if value not in implemented:
                raise ValueError(
                    f"This MPT config has {name}={value!r}, which is not implemented; the only value that loads is "
                    f"{implemented[0]!r}."
                )
        return cls(**options)


__all__ = ["OtterMptConfig"]
