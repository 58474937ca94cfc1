"""Flamingo model configuration (Alayrac et al. 2022, https://huggingface.co/papers/2204.14198)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ..attention_choice import AttentionByPart
from ..legacy import upgrade_config_dict
from ..legacy_tokens import HUB_ARGUMENTS
from ..stored_sizes import refuse_impossible


@strict
class FlamingoConfig(AttentionByPart, PreTrainedConfig):
    r"""
    Configuration of [`FlamingoModel`] and [`FlamingoForConditionalGeneration`].

    The defaults of the resampler and of the cross-attention are those of OpenFlamingo and Otter (2023), whose
    `config.json` does not store them. A `config.json` of that time is read as it is: see `otter_hf.models.legacy`.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, defaults to a CLIP ViT-L/14 vision tower):
            Any vision encoder known to `AutoModel`, with token features `(N, v, D)` or feature maps `(N, D, h, w)`.
        text_config (`dict` or `PreTrainedConfig`, defaults to Llama):
            A decoder listed in `otter_hf.models.flamingo.decoders_flamingo.SUPPORTED_DECODERS`.
        vision_feature_select_strategy (`"default"` or `"full"`):
            `"default"` drops the first token of the tower's output (the class token of CLIP, ViT, DINOv2);
            `"full"` keeps all of them (SigLIP). Without effect on feature maps, which have no class token.
        cross_attn_every_n_layers (`int`): a gated cross-attention block sits in front of every n-th decoder layer
            (the n-th, 2n-th, ...).
        cross_attn_num_heads, cross_attn_head_dim, cross_attn_ff_mult (`int`): shape of these blocks.
        cross_attn_gate_init (`float`): initial value of both tanh gates. 0 (the paper) leaves the language model
            unchanged at the start; a model trained from scratch wants its gates open.
        cross_attn_on_text (`bool`): whether tokens that see no image pass the feed-forward part of these blocks, as
            published. `False` leaves such tokens as they are: without images the model then computes what its decoder
            does, to the bit, however long the blocks were trained.
        perceiver_depth, perceiver_num_latents, perceiver_num_heads, perceiver_head_dim, perceiver_ff_mult (`int`):
            shape of the perceiver resampler. Its width is that of the vision tower.
        max_num_frames (`int`, *optional*): rows of the learned frame embedding. Without it frames of a video are not
            told apart by their order.
        image_token_id, end_of_chunk_token_id, answer_token_id (`int`, *optional*): ids of `<image>`,
            `<|endofchunk|>` and (Otter) `<answer>`.
        tokenizer_vocab_size (`int`, *optional*): size of the tokenizer, where the embedding has more rows: those were
            never trained, and generation does not choose them. `resize_token_embeddings` changes it; raise it, or set
            it to None, when the tokenizer grows into rows that are there already.
        lora_config (`dict`, *optional*): arguments of `peft.LoraConfig`, for an Otter of 2023 that was trained and
            saved with LoRA layers inside its language model: `r`, `lora_alpha`, `lora_dropout`, `target_modules`. They
            stay layers of their own, since merging them rounds; `otter-hf convert lora` merges them, or makes a PEFT
            adapter of them. For LoRA on any other model use PEFT.
        bos_token_id, eos_token_id, pad_token_id (`int`, or for the second a list, *optional*): where generation begins
            and ends, and the padding of finished rows.
        tie_word_embeddings (`bool`, *optional*): taken from `text_config` when not given.
    """

    model_type = "flamingo"
    # not for the Trainer's predictions, which shall be logits alone
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states"]
    # TRL asks any class that transformers does not export for its map of remote code: there is none
    auto_map = {}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_act": "quick_gelu",
                "hidden_size": 1024,
                "image_size": 224,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_feature_select_strategy: str = "default"
    cross_attn_every_n_layers: int = 4
    cross_attn_num_heads: int = 8
    cross_attn_head_dim: int = 64
    cross_attn_ff_mult: int = 4
    cross_attn_gate_init: float = 0.0
    cross_attn_on_text: bool = True
    perceiver_depth: int = 6
    perceiver_num_latents: int = 64
    perceiver_num_heads: int = 8
    perceiver_head_dim: int = 64
    perceiver_ff_mult: int = 4
    max_num_frames: int | None = None
    image_token_id: int | None = None
    end_of_chunk_token_id: int | None = None
    answer_token_id: int | None = None
    tokenizer_vocab_size: int | None = None
    lora_config: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.architectures:  # as in 2023; TRL wants a name
            self.architectures = [f"{type(self).__name__.removesuffix('Config')}ForConditionalGeneration"]
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is {self.vision_feature_select_strategy!r}; use 'default' (drop the "
                "class token) or 'full' (keep every token)."
            )
        if self.cross_attn_every_n_layers < 1:
            raise ValueError(f"cross_attn_every_n_layers is {self.cross_attn_every_n_layers}; it must be at least 1.")
        vocab_size = getattr(self.text_config, "vocab_size", None)
        for name in ("image_token_id", "end_of_chunk_token_id", "answer_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and vocab_size is not None and not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} is {token_id}, outside the text model's vocabulary of {vocab_size} rows; set "
                    "text_config.vocab_size to the number of embedding rows, or call resize_token_embeddings first."
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in the parent class."""
        # `from_dict` must know where the configuration came from: AutoConfig tells it the name, this all there is
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        kwargs["hub_kwargs"] = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As in the parent class; a configuration written by the 2023 code is translated first.

        The Auto classes tell only the name: through them the token ids are read without `revision`, `subfolder` and
        `token`. Where a repository of 2023 needs these, use the `from_pretrained` of this class or of the model.

        Args:
            tokenizer (*optional*): for a 2023 repository without tokenizer files, a tokenizer or the folder of one.
        """
        refuse_impossible(config_dict, kwargs.get("name_or_path"))
        tokenizer, hub_kwargs = kwargs.pop("tokenizer", None), kwargs.pop("hub_kwargs", {})
        config_dict = upgrade_config_dict(config_dict, kwargs.get("name_or_path"), tokenizer, **hub_kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def vision_hidden_size(self) -> int:
        """Width D of the features the vision tower hands to the resampler."""
        # convolutional backbones (ResNet, ConvNeXt, Swin) list one width per stage; the last one is the output
        sizes = getattr(self.vision_config, "hidden_sizes", None)
        return sizes[-1] if sizes else self.vision_config.hidden_size


__all__ = ["FlamingoConfig"]
