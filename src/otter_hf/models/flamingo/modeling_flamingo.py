"""
Flamingo (Alayrac et al. 2022, https://huggingface.co/papers/2204.14198) on any transformers decoder, in the shape
OpenFlamingo (Awadalla et al. 2023, https://huggingface.co/papers/2308.01390) and Otter (Li et al. 2023,
https://huggingface.co/papers/2305.03726) gave it: a vision tower, a perceiver resampler, and tanh-gated
cross-attention blocks in front of some layers of an otherwise untouched decoder.

Shape legend: B rows, L text tokens, T media (one per `<image>`), F frames of one medium, v vision tokens of one frame,
n latents of one medium, D vision width, H heads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import load_state_dict, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..attention_choice import attention_for, check_parts
from ..decoding_masks import mask_without_reading
from ..legacy import name_lora_layers
from ..legacy_names import NamesOf2023, refuse_arguments_of_2023, saved_under_names_of_2023
from ..lm_loss import scale_logits, supervised_loss
from ..media_attention import running_media_index
from ..media_cache import MediaDynamicCache, with_media
from ..mixed_dtypes import dtype_of, in_dtype_of
from ..offloading import device_of_inputs, index_tied_weights
from ..quantization import keep_stored_weights
from ..stored_sizes import refuse_other_sizes
from ..varlen_attention import may_be_packed
from .configuration_flamingo import FlamingoConfig
from .decoders_flamingo import get_decoder_layers, make_language_model, reset_adapters
from .generation_flamingo import FlamingoGenerationMixin, accept_legacy_arguments
from .layers_flamingo import PerceiverResampler, make_media_groups
from .media_flamingo import FlamingoMediaMixin
from .tower_flamingo import freeze_unused_modules, keep_frozen_statistics, require_input_grad


@dataclass
class FlamingoModelOutputWithPast(ModelOutput):
    """
    Args:
        last_hidden_state: `(B, L, hidden)`.
        past_key_values: the cache, holding the images too.
        hidden_states, attentions: of the decoder, as in the text model.
        cross_attentions: one `(B, H, L, n)` per gated layer, with `output_attentions=True` and eager attention: how
            much each token looks at each latent of the one image it sees; zeros where it sees none.
        image_hidden_states: `(B, T, n, D)` latents of the resampler; zeros where a row has fewer images.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class FlamingoCausalLMOutputWithPast(ModelOutput):
    """
    Args:
        loss: scalar, given `labels`.
        logits: `(B, L, vocab)`, or fewer positions with `logits_to_keep`; None where `skip_logits` applies.
        past_key_values, hidden_states, attentions, cross_attentions, image_hidden_states: see
            [`FlamingoModelOutputWithPast`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


class FlamingoPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the declarations transformers reads; see [`FlamingoConfig`] for the architecture."""

    config: FlamingoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlamingoDecoderLayer", "PerceiverBlock"]
    _skip_keys_device_placement = ["past_key_values", "media_cache", "media_outputs"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """As in the parent class; of offloaded weights where they are computed with."""
        return device_of_inputs(self, super().device)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in the parent class; what transformers took in 2023 ends in a ValueError with today's line."""
        refuse_arguments_of_2023(kwargs)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers does not initialise modules without parameters of their own in custom code, as it may overwrite
        # loaded weights. Ours does not, and needs those modules: the one that sets the gates, and CLIP's layers
        return False

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """
        As in the parent class: a name for all parts that have it (others take `eager`, which is said), or a dict by
        part: `""` (gated blocks and resampler), `vision_config`, `text_config`.

        Raises:
            ValueError: for a part that there is not.
        """
        check_parts(self.config, attn_implementation)
        if isinstance(attn_implementation, str):
            attn_implementation = dict.fromkeys(["", *self.config.sub_configs], attn_implementation)
        parts = {id(getattr(self.config, name)): name for name in self.config.sub_configs}
        for module in self.modules():
            name = parts.get(id(module.config)) if isinstance(module, PreTrainedModel) else None
            requested = attn_implementation.get(name)
            if name is not None and isinstance(requested, str):
                attn_implementation = {**attn_implementation, name: attention_for(type(module), requested, name)}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            init.normal_(module.latents)
            if module.frame_embs is not None:
                init.normal_(module.frame_embs)
        elif isinstance(module, FlamingoModel):
            # gated blocks and LoRA live inside the language model, whose own initialisation does not know them
            for layer in module.decoder_layers:
                if layer.gated_cross_attn_layer is not None:
                    init.constant_(layer.gated_cross_attn_layer.attn_gate, self.config.cross_attn_gate_init)
                    init.constant_(layer.gated_cross_attn_layer.ff_gate, self.config.cross_attn_gate_init)
            if self.config.lora_config is not None:
                reset_adapters(module.language_model)

    def enable_input_require_grads(self):
        """
        As in the parent class, for what reentrant checkpointing needs: text, and the inputs of vision tower and
        resampler where something in them is trained. A frozen tower needs no backward pass.
        """
        core = self.base_model
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        parts = (core.vision_tower, core.perceiver)
        self._require_grads_hooks = [hook, *(part.register_forward_pre_hook(require_input_grad) for part in parts)]
        self._require_grads_hook = hook

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        refuse_other_sizes(model, state_dict, checkpoint_files, load_config, **kwargs)
        if model.config.lora_config is not None:
            if state_dict is None:
                state_dict = {key: value for file in checkpoint_files for key, value in load_state_dict(file).items()}
            state_dict = name_lora_layers(state_dict, model.config.lora_config)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        index_tied_weights(model, loaded[1])
        keep_stored_weights(model)
        freeze_unused_modules(model.base_model.vision_tower)  # loading makes every parameter trainable
        return loaded

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module:
        """As in the parent class; rows up to `new_num_tokens` are tokens from now on, which generation may choose."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None and self.config.tokenizer_vocab_size is not None:
            self.config.tokenizer_vocab_size = new_num_tokens
        return embeddings

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """
        As in the parent class, with today's weight names by default; `save_original_format=True` writes those of the
        2023 code.
        """
        with saved_under_names_of_2023(self):
            return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


class FlamingoModel(FlamingoPreTrainedModel, FlamingoMediaMixin):
    """
    The model without a language-modelling head.

    Raises:
        ValueError: at construction, for a text model that does not hand images on to its layers.
    """

    def __init__(self, config: FlamingoConfig):
        super().__init__(config)
        tower_class = MODEL_MAPPING[type(config.vision_config)]
        config.vision_config._attn_implementation = attention_for(
            tower_class, config.vision_config._attn_implementation, "vision_config"
        )
        self.vision_tower = AutoModel.from_config(config.vision_config)
        freeze_unused_modules(self.vision_tower)
        self.perceiver = PerceiverResampler(config)
        self.language_model = make_language_model(config)
        self.gradient_checkpointing = False
        self.post_init()
        # one unit per layer for FSDP and device maps, gated block included
        self._no_split_modules -= self.language_model._no_split_modules
        # CLIP's towers name layers of the text tower too, which FSDP would look for in vain
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def train(self, mode: bool = True):
        """
        As in the parent class, but what is frozen of the vision tower keeps its statistics: a frozen tower stays in
        evaluation mode, and so do frozen batch norms in a tower of which something else is trained.
        """
        super().train(mode)
        if mode:
            keep_frozen_statistics(self.vision_tower)
        return self

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's layers, each a [`FlamingoDecoderLayer`]."""
        return get_decoder_layers(self.language_model)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

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

    def _is_decoding_step(self, seen: torch.Tensor | None, length: int) -> bool:
        return (
            seen is not None and length == 1 and seen.device.type in ("cpu", "cuda") and not is_torchdynamo_compiling()
        )

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return dtype_of(self)

    @can_return_tuple
    @accept_legacy_arguments
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
        media_counts: list[int] | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        frame_counts: list[list[int]] | None = None,
        image_hidden_states: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlamingoModelOutputWithPast:
        """
        Args:
            input_ids: `(B, L)`.
            pixel_values: `(B, T, F, C, H, W)`, also `(B, T, C, H, W)` and `(B, C, H, W)`; medium `i` of a row
                belongs to its `i`-th `<image>` in `input_ids`. Rows with fewer media and media with fewer frames are
                padded at the end, with anything finite.
            attention_mask: `(B, L)`, 1 for tokens, 0 for padding (left or right).
            position_ids: `(B, L)`.
            past_key_values: a cache from an earlier call; it holds the images seen so far, and `pixel_values` then
                belongs to the `<image>` tokens of this call's `input_ids`.
            inputs_embeds: `(B, L, hidden)` in place of `input_ids`.
            media_index: `(B, L)` int64, the 1-based medium each token sees, 0 for none. By default the last `<image>`
                at or before the token.
            use_cache: whether to return a cache; `config.use_cache` by default. Packed samples (`position_ids` that
                restart, and no `attention_mask`) make none.
            pixel_attention_mask: `(B, T, F)`, 1 for frames, 0 for padding; by default all are frames. Padding is
                neither encoded nor seen (a compiled graph encodes it, and hides it then).
            media_counts, frame_counts: how many media the tokens of each row refer to, if there is no cache, and how
                many frames each medium has in the mask; see `known_on_host`.
            image_hidden_states: `(B, T, n, D)` in place of `pixel_values`: latents of media that were encoded before,
                as this model returned them (`get_image_features`, or an output of this name). They depend on nothing
                but the medium and the weights, so that one encoding serves any number of rows and calls. Rows with
                fewer media are padded at the end; `pixel_attention_mask` says which are there, if given.
            kwargs: handed to the text model.

        Raises:
            ValueError: if media and `<image>` tokens do not fit together (without `pixel_attention_mask` media behind
                those that a row refers to are taken for padding), media are given twice, or not exactly one of
                `input_ids` and `inputs_embeds` is given.
            RuntimeError: for a single `<image>` on top of a cache without `pixel_values`; on CUDA by a device-side
                assertion, as decoding steps are not waited for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        shape = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]  # (B, L)
        if past_key_values is None and use_cache:
            use_cache = not may_be_packed(attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        if past_key_values is None and use_cache:
            past_key_values = MediaDynamicCache(config=self.config.text_config)
        cache = None if past_key_values is None else with_media(past_key_values)
        seen = None if cache is None else cache.media_seen  # (B,)
        in_order = media_index is None
        if media_index is None:
            in_view = None if cache is None else cache.media_in_view
            media_index = running_media_index(self._find_media_tokens(input_ids, inputs_embeds), seen, in_view)
        elif media_index.shape != shape:
            raise ValueError(
                f"media_index has shape {tuple(media_index.shape)}; expected {tuple(shape)}, one number per token."
            )

        if pixel_values is None and image_hidden_states is None and self._is_decoding_step(seen, shape[1]):
            # the device looks for itself, and nobody waits for it (others cannot)
            torch._assert_async(
                (media_index.amax(dim=1) <= cache.num_media).all(),
                "input_ids holds an image token on top of a cache, but no pixel_values; pass one image per `<image>`.",
            )
            vision_states = None
        else:
            vision_states = self._encode_media(
                pixel_values,
                pixel_attention_mask,
                image_hidden_states,
                media_index if seen is None else (media_index - seen[:, None]).clamp(min=0),  # (B, L)
                explicit=not in_order,
                blank=self.training and seen is None,
                known=None if seen is not None else (media_counts, frame_counts),
            )
        num_media = 0 if cache is None else cache.num_media
        if vision_states is not None:
            num_media += vision_states.shape[1]

        # the text model does not see the outer configuration, only arguments
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.setdefault(name, getattr(self.config, name))
        recording = kwargs["output_attentions"] or kwargs["output_hidden_states"] not in (None, False)
        media_outputs = {"inputs": [], "cross_attentions": []} if recording else None
        outputs = self.language_model(
            input_ids=input_ids,
            attention_mask=mask_without_reading(
                self.config.text_config, attention_mask, past_key_values, shape, kwargs.get("cu_seq_lens_q")
            ),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            vision_states=vision_states,
            media_groups=make_media_groups(
                self.config, media_index, num_media, self._compute_dtype(media_index.device.type), in_order
            ),
            media_cache=cache,
            media_outputs=media_outputs,
            **kwargs,
        )
        if cache is not None:
            cache.update_media_index(media_index)
        hidden_states = outputs.hidden_states
        if hidden_states and hidden_states[0] is not None:
            hidden_states = (media_outputs["inputs"][0], *hidden_states[1:])
        return FlamingoModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            cross_attentions=tuple(media_outputs["cross_attentions"]) if kwargs["output_attentions"] else None,
            image_hidden_states=vision_states,
        )


class FlamingoForConditionalGeneration(NamesOf2023, FlamingoPreTrainedModel, FlamingoGenerationMixin):
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

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See [`FlamingoModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, pixel_attention_mask, **kwargs)

    @can_return_tuple
    @accept_legacy_arguments
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
        skip_logits: bool | None = None,
        target_count: int | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlamingoCausalLMOutputWithPast:
        """
        Args:
            labels: `(B, L)`, not shifted; -100 is ignored.
            use_cache: with labels there is none by default: a loss needs no cache, and a cache hides from the text
                model where packed samples begin.
            logits_to_keep: logits of the last so many positions only (0: all), or of the positions given.
            skip_logits: with labels, compute logits only where a label asks for them, in bounded memory, and return
                none. By default in training, unless `loss_function` was replaced.
            target_count: number of labels, if the host knows it; see `known_on_host`.
            kwargs: `num_items_in_batch` divides the summed loss; all are handed to the text model.

        For the other arguments and errors see [`FlamingoModel.forward`].

        Raises:
            ValueError: for `skip_logits` without labels.
        """
        if labels is None and skip_logits:
            raise ValueError("skip_logits is True, but there are no labels to compute a loss from; pass labels.")
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            media_index=media_index,
            use_cache=use_cache,
            pixel_attention_mask=pixel_attention_mask,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and labels is not None and self.loss_function is ForCausalLMLoss
        loss = logits = None
        text_config = self.config.text_config
        # MPT multiplies its logits, Gemma bends them
        scaling = {
            "scale": getattr(text_config, "logit_scale", None),
            "softcap": getattr(text_config, "final_logit_softcapping", None),
        }
        loss_kwargs = {"labels": labels, "vocab_size": text_config.vocab_size, **kwargs}
        hidden_states = in_dtype_of(self.lm_head.weight, outputs.last_hidden_state)
        if skip_logits:
            loss = supervised_loss(self.lm_head, hidden_states, target_count=target_count, **scaling, **loss_kwargs)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
            logits = scale_logits(logits, **scaling)
            if labels is not None:
                loss = self.loss_function(logits=logits, **loss_kwargs)
        return FlamingoCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = [
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "FlamingoPreTrainedModel",
]
