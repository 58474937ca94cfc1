"""
Flamingo (Alayrac et al. 2022, https://huggingface.co/papers/2204.14198) on any transformers decoder, in the shape
OpenFlamingo (Awadalla et al. 2023, https://huggingface.co/papers/2308.01390) and Otter (Li et al. 2023,
https://huggingface.co/papers/2305.03726) gave it: a vision tower, a perceiver resampler, and tanh-gated
cross-attention blocks in front of some layers of an otherwise untouched decoder.

Shape legend: B rows, L text tokens, T media (one per `<image>`), F frames of one medium, v vision tokens of one frame,
n latents of one medium, D vision width, H heads, d head width; N, c as in `media_attention`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..media_attention import MediaBlocks, make_media_blocks, running_media_index
from ..media_cache import MediaCacheMixin, with_media
from .configuration_flamingo import FlamingoConfig


logger = logging.get_logger(__name__)

# model_type of every decoder that hands unknown keyword arguments on to its layers, which is how images reach the
# gated blocks. Others would run blind without an error (Falcon, BLOOM, GPT-J and transformers' own MPT do), or scale
# their logits outside the headless model (Cohere, Granite, Gemma 2). Value: where the layers are.
SUPPORTED_DECODERS = {
    "gemma": "layers",
    "gemma3_text": "layers",
    "gpt_neox": "layers",
    "llama": "layers",
    "mistral": "layers",
    "olmo2": "layers",
    "opt": "decoder.layers",
    "otter_mpt": "blocks",
    "phi": "layers",
    "phi3": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
    "smollm3": "layers",
    "stablelm": "layers",
}

# parameters of a tower that do not reach `last_hidden_state`: frozen, or DDP would wait for their gradients for ever
_UNUSED_TOWER_MODULES = {
    "clip_vision_model": ["post_layernorm"],
    "convnext": ["layernorm"],
    "convnextv2": ["layernorm"],
    "siglip_vision_model": ["head"],
    "vit": ["pooler"],
}


@dataclass
class FlamingoModelOutputWithPast(ModelOutput):
    """
    Args:
        last_hidden_state: `(B, L, hidden)`.
        past_key_values: the cache, holding the images too.
        hidden_states, attentions: of the decoder, as in the text model.
        image_hidden_states: `(B, T, n, D)` latents of the resampler; zeros where a row has fewer images.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class FlamingoCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss: scalar, given `labels`.
        logits: `(B, L, vocab)`, or fewer positions with `logits_to_keep`.
        past_key_values, hidden_states, attentions, image_hidden_states: see [`FlamingoModelOutputWithPast`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`(N, H, c, d)` queries over `(N, H, n, d)` keys and values -> `(N, c, H, d)`, weights `(N, H, c, n)`."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class CrossAttention(nn.Module):
    """Bias-free multi-head attention of queries over the keys and values of one source, without any mask."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: FlamingoConfig, query_dim: int, source_dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.scaling = head_dim**-0.5
        inner_dim = num_heads * head_dim
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(source_dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim, bias=False)

    def attend(self, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        """`query (N, c, H*d)`, `key_value (N, n, 2*H*d)` -> `(N, c, H*d)`."""
        states = (query, *key_value.chunk(2, dim=-1))
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in states)  # (N, H, ., d)
        implementation = self.config._attn_implementation
        # flex attention exists for masks, and there is none here
        if implementation == "flex_attention":
            implementation = "sdpa"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0, is_causal=False)
        return output.flatten(2)


class FeedForward(nn.Sequential):
    """LayerNorm, expand, GELU, contract; the indices 0, 1 and 3 are part of the published weight names."""

    def __init__(self, dim: int, mult: int):
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, mult * dim, bias=False),
            nn.GELU(),
            nn.Linear(mult * dim, dim, bias=False),
        )


class PerceiverBlock(GradientCheckpointingLayer, CrossAttention):
    """The latents attend to the medium and to themselves, then pass a feed-forward layer."""

    def __init__(self, config: FlamingoConfig):
        dim = config.vision_hidden_size
        super().__init__(config, dim, dim, config.perceiver_num_heads, config.perceiver_head_dim)
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, config.perceiver_ff_mult)

    def forward(self, latents: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        """`latents (N, n, D)`, `media (N, F*v, D)` -> `(N, n, D)`."""
        normed = self.norm_latents(latents)
        source = torch.cat([self.norm_media(media), normed], dim=1)  # (N, F*v + n, D)
        latents = latents + self.to_out(self.attend(self.to_q(normed), self.to_kv(source)))
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """
    Turns the features of an image or video into a fixed number of latents (Alayrac et al. 2022, section 3.1.1;
    Jaegle et al. 2021, https://huggingface.co/papers/2103.03206).
    """

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        dim = config.vision_hidden_size
        self.latents = nn.Parameter(torch.empty(config.perceiver_num_latents, dim))
        self.frame_embs = None
        if config.max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.empty(config.max_num_frames, dim))
        self.layers = nn.ModuleList([PerceiverBlock(config) for _ in range(config.perceiver_depth)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        `features (N, F, v, D)` -> `(N, n, D)`.

        Raises:
            ValueError: for more frames than the model has frame embeddings.
        """
        if self.frame_embs is not None:
            num_frames, max_num_frames = features.shape[1], self.frame_embs.shape[0]
            if num_frames > max_num_frames:
                raise ValueError(
                    f"pixel_values has {num_frames} frames per medium, but the model has embeddings for "
                    f"{max_num_frames} (config.max_num_frames); sample at most {max_num_frames} frames."
                )
            features = features + self.frame_embs[:num_frames, None]
        media = features.flatten(1, 2)  # (N, F*v, D)
        latents = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        return self.norm(latents)


class GatedCrossAttention(CrossAttention):
    """Text tokens attend to the latents of the one image each of them sees; tokens that see none get 0."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        hidden_size = config.text_config.hidden_size
        super().__init__(
            config, hidden_size, config.vision_hidden_size, config.cross_attn_num_heads, config.cross_attn_head_dim
        )
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: torch.Tensor | None,
        media_blocks: MediaBlocks,
        media_cache: MediaCacheMixin | None,
    ) -> torch.Tensor:
        """
        `hidden_states (B, L, hidden)`; `vision_states (B, T, n, D)` of the images new in this call, or None when all
        are in `media_cache` already.
        """
        if vision_states is None:
            key_value = media_cache.media_key_values[self.layer_idx]
        else:
            key_value = self.to_kv(vision_states)  # (B, T, n, 2*H*d)
            if media_cache is not None:
                key_value = media_cache.update_media(key_value, self.layer_idx)
        query = media_blocks.gather_tokens(self.to_q(self.norm(hidden_states)))  # (N, c, H*d)
        attended = self.attend(query, media_blocks.gather_media(key_value))
        return self.to_out(media_blocks.scatter_tokens(attended))


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """Tanh-gated cross-attention and feed-forward (Alayrac et al. 2022, section 3.1.2)."""

    def __init__(self, config: FlamingoConfig, layer_idx: int):
        super().__init__()
        self.attn = GatedCrossAttention(config, layer_idx)
        self.attn_gate = nn.Parameter(torch.empty(1))
        self.feed_forward = FeedForward(config.text_config.hidden_size, config.cross_attn_ff_mult)
        self.ff_gate = nn.Parameter(torch.empty(1))

    # tensors that carry gradients come first and by position: reentrant checkpointing follows only those
    def forward(
        self,
        hidden_states: torch.Tensor,
        vision_states: torch.Tensor | None,
        media_blocks: MediaBlocks | None,
        media_cache: MediaCacheMixin | None,
    ) -> torch.Tensor:
        """`(B, L, hidden)` -> `(B, L, hidden)`; without any image only the feed-forward part acts, as published."""
        if media_blocks is not None:
            attended = self.attn(hidden_states, vision_states, media_blocks, media_cache)
            hidden_states = hidden_states + attended * self.attn_gate.tanh()
        return hidden_states + self.feed_forward(hidden_states) * self.ff_gate.tanh()


class FlamingoDecoderLayer(nn.Module):
    """
    A decoder layer of the text model, untouched, with an optional gated block in front.

    A plain module, not a checkpointing one: both parts checkpoint themselves, and a checkpoint around both would
    recompute the gated block twice and break reentrant checkpointing.
    """

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: GatedCrossAttentionBlock | None):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer

    def forward(self, hidden_states, *args, vision_states=None, media_blocks=None, media_cache=None, **kwargs):
        """As the wrapped layer; the three media arguments are those of [`GatedCrossAttentionBlock`]."""
        if self.gated_cross_attn_layer is not None:
            hidden_states = self.gated_cross_attn_layer(hidden_states, vision_states, media_blocks, media_cache)
        return self.decoder_layer(hidden_states, *args, **kwargs)


class FlamingoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations transformers reads; see [`FlamingoConfig`] for the architecture."""

    config: FlamingoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlamingoDecoderLayer", "PerceiverBlock"]
    _skip_keys_device_placement = ["past_key_values", "media_cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents)
            if module.frame_embs is not None:
                init.normal_(module.frame_embs)
        elif isinstance(module, FlamingoModel):
            # the gated blocks live inside the language model, whose own initialisation does not know their gates
            for layer in module.decoder_layers:
                if layer.gated_cross_attn_layer is not None:
                    init.constant_(layer.gated_cross_attn_layer.attn_gate, self.config.cross_attn_gate_init)
                    init.constant_(layer.gated_cross_attn_layer.ff_gate, self.config.cross_attn_gate_init)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """
        As in the parent class, with today's weight names by default; `save_original_format=True` writes those of the
        2023 code.
        """
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class FlamingoModel(FlamingoPreTrainedModel):
    """
    The model without a language-modelling head.

    Raises:
        ValueError: at construction, for a text model that does not hand images on to its layers.
    """

    def __init__(self, config: FlamingoConfig):
        super().__init__(config)
        text_type = config.text_config.model_type
        if text_type not in SUPPORTED_DECODERS:
            raise ValueError(
                f"text_config.model_type is {text_type!r}, a decoder that images cannot reach; use one of "
                f"{', '.join(sorted(SUPPORTED_DECODERS))}."
            )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        for name in _UNUSED_TOWER_MODULES.get(config.vision_config.model_type, []):
            getattr(self.vision_tower, name).requires_grad_(False)
        self.perceiver = PerceiverResampler(config)
        self.language_model = AutoModel.from_config(config.text_config)
        layers = self.decoder_layers
        for layer_idx, decoder_layer in enumerate(layers):
            gated = (layer_idx + 1) % config.cross_attn_every_n_layers == 0
            layers[layer_idx] = FlamingoDecoderLayer(
                decoder_layer, GatedCrossAttentionBlock(config, layer_idx) if gated else None
            )
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's layers, each a [`FlamingoDecoderLayer`]."""
        return self.language_model.get_submodule(SUPPORTED_DECODERS[self.config.text_config.model_type])

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Encode media: `pixel_values (N, F, C, H, W)` -> latents `(N, n, D)`.

        The vision tower's last hidden state feeds the resampler, without its final norm and class token, as in the
        2023 code (open_clip up to 2.22).
        """
        num_media = pixel_values.shape[0]
        features = self.vision_tower(pixel_values.flatten(0, 1).to(self.vision_tower.dtype)).last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # (N*F, D, h, w) -> (N*F, v, D)
        elif self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return self.perceiver(features.unflatten(0, (num_media, -1)))

    def _find_media_tokens(self, input_ids, inputs_embeds) -> torch.Tensor:
        """`(B, L)` bool, True at `<image>`; given only embeddings, where they equal that of `<image>`."""
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            # no id: nothing can be an image token, and -1 is no token
            return input_ids == (-1 if image_token_id is None else image_token_id)
        if image_token_id is None:
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        token = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _encode_referenced(self, pixel_values: torch.Tensor, num_referenced: list[int] | None) -> torch.Tensor:
        """
        `pixel_values (B, T, F, C, H, W)` -> `(B, T, n, D)`; of row `b` only the first `num_referenced[b]` media are
        encoded, the rest are zeros. None (while compiling, when nothing can be read back) encodes all.
        """
        batch_size, num_media = pixel_values.shape[:2]
        if num_referenced is None or sum(num_referenced) == batch_size * num_media:
            return self.get_image_features(pixel_values.flatten(0, 1)).unflatten(0, (batch_size, num_media))
        # at least one medium is always encoded: in distributed training every rank must run the same modules
        places = [(row, i) for row, count in enumerate(num_referenced) for i in range(count)] or [(0, 0)]
        rows, columns = torch.tensor(places, device=pixel_values.device).unbind(1)
        latents = self.get_image_features(pixel_values[rows, columns])
        states = latents.new_zeros(batch_size, num_media, *latents.shape[1:])
        return states.index_put((rows, columns), latents)

    def _check_media(self, media_index, seen, pixel_values) -> list[int]:
        """How many of its media in `pixel_values` each row refers to. Raises ValueError where they are too few."""
        referenced = media_index.amax(dim=1) if seen is None else (media_index.amax(dim=1) - seen).clamp(min=0)
        referenced = referenced.tolist()
        num_media = 0 if pixel_values is None else pixel_values.shape[1]
        row = max(range(len(referenced)), key=referenced.__getitem__)
        if referenced[row] > num_media:
            raise ValueError(
                f"input_ids row {row} refers to {referenced[row]} new media, but pixel_values holds {num_media} per "
                "row; pass one image per `<image>` token."
            )
        return referenced

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        media_index: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> FlamingoModelOutputWithPast:
        """
        Args:
            input_ids: `(B, L)`.
            pixel_values: `(B, T, F, C, H, W)`, also `(B, T, C, H, W)` and `(B, C, H, W)`; medium `i` of a row
                belongs to its `i`-th `<image>` in `input_ids`. Rows with fewer media are padded, with anything finite.
            attention_mask: `(B, L)`, 1 for tokens, 0 for padding (left or right).
            position_ids: `(B, L)`.
            past_key_values: a cache from an earlier call; it holds the images seen so far, and `pixel_values` then
                belongs to the `<image>` tokens of this call's `input_ids`.
            inputs_embeds: `(B, L, hidden)` in place of `input_ids`.
            media_index: `(B, L)` int64, the 1-based medium each token sees, 0 for none. By default the last `<image>`
                at or before the token.
            use_cache: whether to return a cache; `config.use_cache` by default.
            kwargs: handed to the text model.

        Raises:
            ValueError: if media and `<image>` tokens do not fit together, or not exactly one of `input_ids` and
                `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config.text_config)
        cache = None if past_key_values is None else with_media(past_key_values)
        seen = None if cache is None else cache.media_seen  # (B,)
        if media_index is None:
            media_index = running_media_index(self._find_media_tokens(input_ids, inputs_embeds), seen)

        if pixel_values is not None:
            pixel_values = _batch_first_media(pixel_values, media_index.shape[0])
        referenced = None if is_torchdynamo_compiling() else self._check_media(media_index, seen, pixel_values)
        vision_states = None if pixel_values is None else self._encode_referenced(pixel_values, referenced)
        num_media = (0 if cache is None else cache.num_media) + (0 if pixel_values is None else pixel_values.shape[1])

        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            vision_states=vision_states,
            media_blocks=make_media_blocks(media_index, num_media) if num_media else None,
            media_cache=cache,
            **kwargs,
        )
        if cache is not None:
            cache.update_media_index(media_index)
        return FlamingoModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=vision_states,
        )


class FlamingoForConditionalGeneration(FlamingoPreTrainedModel, GenerationMixin):
    """Flamingo with a language-modelling head: loss and generation."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FlamingoConfig):
        super().__init__(config)
        self.model = FlamingoModel(config)
        text_config = config.text_config
        # OPT projects its hidden states before the head
        width = getattr(text_config, "word_embed_proj_dim", text_config.hidden_size)
        self.lm_head = nn.Linear(width, text_config.vocab_size, bias=False)
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`FlamingoModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        media_index: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> FlamingoCausalLMOutputWithPast:
        """
        Args:
            labels: `(B, L)`, not shifted; -100 is ignored.
            logits_to_keep: logits of the last so many positions only (0: all), or of the positions given.
            kwargs: `num_items_in_batch` divides the summed loss; all are handed to the text model.

        For the other arguments and errors see [`FlamingoModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            media_index=media_index,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return FlamingoCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        media_index=None,
        pixel_values=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """
        As in the parent class. A chat continued on a cache may pass the images of the whole conversation, as a
        processor makes them, or only the new ones.
        """
        if is_first_iteration and pixel_values is not None and past_key_values is not None:
            pixel_values = self._new_media(input_ids, pixel_values, past_key_values)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            pixel_values=pixel_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if media_index is not None:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["media_index"] = media_index[:, -tokens.shape[1] :]
        return inputs

    def _new_media(self, input_ids, pixel_values, past_key_values) -> torch.Tensor | None:
        """The media in `pixel_values` that a cache does not hold yet, aligned to the left; see the caller."""
        seen = getattr(past_key_values, "media_seen", None)
        if seen is None:
            return pixel_values
        pixel_values = _batch_first_media(pixel_values, input_ids.shape[0])
        total = (input_ids == self.config.image_token_id).sum(dim=1)
        if pixel_values.shape[1] < int(total.max()):
            return pixel_values  # only the new ones
        place = torch.arange(pixel_values.shape[1], device=seen.device) + seen[:, None]  # (B, T)
        rows = torch.arange(place.shape[0], device=seen.device)[:, None]
        num_new = int((total - seen).max())
        if num_new <= 0:
            return None
        return pixel_values[rows, place[:, :num_new].clamp(max=pixel_values.shape[1] - 1)]

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, num_new_tokens=1, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )
        # a generated token sees what the token before it saw
        if (media_index := model_kwargs.get("media_index")) is not None:
            new = media_index[:, -1:].expand(-1, num_new_tokens)
            model_kwargs["media_index"] = torch.cat([media_index, new], dim=1)
        return model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            with_media(model_kwargs["past_key_values"])

    def _prepare_generation_config(self, generation_config, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # `<image>` is a place to put an image, not a word: generated, it would ask for an image that does not exist
        if self.config.image_token_id is not None:
            suppressed = set(generation_config.suppress_tokens or []) | {self.config.image_token_id}
            generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs


def _batch_first_media(pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """`(B, C, H, W)`, `(B, T, C, H, W)` or `(B, T, F, C, H, W)` -> `(B, T, F, C, H, W)`; ValueError otherwise."""
    if pixel_values.ndim == 4:
        pixel_values = pixel_values[:, None, None]
    elif pixel_values.ndim == 5:
        pixel_values = pixel_values[:, :, None]
    if pixel_values.ndim != 6 or pixel_values.shape[0] != batch_size:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (B, T, F, C, H, W), (B, T, C, H, W) or "
            f"(B, C, H, W) with B = {batch_size}, the rows of input_ids."
        )
    return pixel_values


__all__ = [
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "FlamingoPreTrainedModel",
]
