"""OtterHD: transformers' Fuyu with packed rows, a frugal loss and image inputs that survive `generate`.

Architecture and numbers are those of Fuyu-8B (https://www.adept.ai/blog/fuyu-8b) as OtterHD
(https://huggingface.co/papers/2311.04219, Luodian/Otter, MIT licence) fine-tuned it: no vision tower, image patches
pass one linear layer and are read by the Persimmon decoder in place of `|SPEAKER|` tokens.

Shapes: B rows, L positions, D hidden size, H heads, E head size, N image patches of the whole batch, V vocabulary.
"""

import torch
from torch import nn
from transformers import FuyuForCausalLM, FuyuModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.fuyu.modeling_fuyu import FuyuPreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from ..decoding_masks import mask_without_reading
from ..legacy_names import refuse_arguments_of_2023
from ..lm_loss import supervised_loss
from ..mixed_dtypes import in_dtype_of
from ..offloading import device_of_inputs, index_tied_weights
from ..quantization import keep_stored_weights
from ..stored_sizes import refuse_other_sizes
from ..varlen_attention import packed_boundaries
from .configuration_otterhd import OtterHDConfig
from .generation_otterhd import OtterHDGenerationMixin


class OtterHDPreTrainedModel(FuyuPreTrainedModel):
    """What all OtterHD models share: configuration, device map units, attention implementations."""

    config: OtterHDConfig
    config_class = OtterHDConfig
    _no_split_modules = ["PersimmonDecoderLayer"]
    # Persimmon refuses flex attention, whatever Fuyu says
    _supports_flex_attn = False

    @property
    def device(self) -> torch.device:
        """As in the parent class; of offloaded weights where they are computed with."""
        return device_of_inputs(self, super().device)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in the parent class; what transformers took in 2023 ends in a ValueError with today's line."""
        refuse_arguments_of_2023(kwargs)
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """
        As in the parent class, with the weight names of `state_dict` by default, which a trainer goes on from;
        `save_original_format=True` writes those that transformers 5 keeps for Fuyu.
        """
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs):
        refuse_other_sizes(model, state_dict, checkpoint_files, load_config, **kwargs)
        loaded = FuyuPreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, **kwargs)
        index_tied_weights(model, loaded[1])
        keep_stored_weights(model)
        return loaded


class OtterHDModel(OtterHDPreTrainedModel, FuyuModel):
    """
    Decoder and patch embedding without a language modeling head.

    Several samples may share a row ("packing"): pass `position_ids` that restart at 0 with each sample and no
    `attention_mask`. With `varlen_sdpa` attention each sample is attended on its own, by torch's variable-length
    kernel where that runs, with flash attention by its own (give `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
    `max_length_k` to spare their computation); `sdpa` and `eager` take a mask of L x L. A packed row makes no cache.
    """

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Embeds image patches; they are cast to the dtype of the weights.

        pixel_values (`torch.FloatTensor` of shape `(N, patch_size * patch_size * num_channels)`):
            Flattened patches (row, column, channel), normalised to about -1 .. 1.
        """
        if pixel_values.shape[-1] != self.vision_embed_tokens.in_features:
            raise ValueError(
                f"pixel_values holds patches of width {pixel_values.shape[-1]}, but patch_size="
                f"{self.config.patch_size} and num_channels={self.config.num_channels} need "
                f"{self.vision_embed_tokens.in_features}: use the processor of this checkpoint."
            )
        # the bias keeps the dtype of the computation where the weight is stored in 4 or 8 bits
        return super().get_image_features(pixel_values.to(self.vision_embed_tokens.bias.dtype), **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        media_counts: list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): token ids, `config.image_token_id` for each patch.
            pixel_values (`torch.FloatTensor` of shape `(N, patch_size * patch_size * num_channels)`): the patches of
                all rows, in the order of their tokens.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for tokens, 0 for padding on either side.
            position_ids (`torch.LongTensor` of shape `(B, L)`): positions; restarts mark packed samples.
            inputs_embeds (`torch.FloatTensor` of shape `(B, L, D)`): embeddings in place of `input_ids`.
            image_grid_thw (`torch.LongTensor` of shape `(I, 3)`): of the processor; the tokens say it already.
            media_counts (`list[int]`): image tokens of each row, if the host knows them; see `known_on_host`.

        Raises:
            ValueError: when image tokens and patches do not match in number, when patches have the wrong width,
                and when there are image tokens but no patches.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.language_model.get_input_embeddings()(input_ids)  # (B, L, D)

        if pixel_values is not None:
            patches = self.get_image_features(pixel_values, return_dict=True).last_hidden_state  # (N, D)
            patches = patches.flatten(0, -2).unsqueeze(0).to(inputs_embeds.device, inputs_embeds.dtype)  # (1, N, D)
            is_patch = self._find_patches(input_ids, inputs_embeds, patches, media_counts)
            inputs_embeds = _put_patches(inputs_embeds, patches[0], is_patch)
        elif input_ids is not None and not is_tracing(input_ids):
            # tokens generated on top of a cache are the model's own words
            if past_key_values is None or (input_ids.shape[1] > 1 and past_key_values.get_seq_length() == 0):
                count = self._count_patches(input_ids, media_counts)
                if count:
                    raise ValueError(
                        f"input_ids holds {count} image tokens (id {self.config.image_token_id}) but pixel_values is "
                        "missing: pass the processor's pixel_values, or the text without image tokens."
                    )
                if self.training:
                    # no patch, yet the patch embedding is run: ranks of a distributed run would wait for its gradient
                    no_patch = inputs_embeds.new_zeros(0, self.vision_embed_tokens.in_features)
                    features = self.get_image_features(no_patch, return_dict=True).last_hidden_state  # (0, D)
                    inputs_embeds = inputs_embeds + features.sum(dim=0).to(inputs_embeds.dtype)

        if kwargs.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError("cu_seq_lens_q needs position_ids that restart at 0 with each packed sample.")
        if attention_mask is None and position_ids is not None and past_key_values is None:
            if kwargs.get("cu_seq_lens_q") is None and position_ids.shape[1] > 1 and not is_tracing(position_ids):
                kwargs |= packed_boundaries(position_ids)
            # a traced graph cannot ask whether positions restart; without a cache the mask is built from them
            if kwargs.get("cu_seq_lens_q") is not None or is_tracing(position_ids):
                use_cache = False

        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask_without_reading(
                self.config.text_config,
                attention_mask,
                past_key_values,
                inputs_embeds.shape[:2],
                kwargs.get("cu_seq_lens_q"),
            ),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def _count_patches(self, input_ids: torch.LongTensor, media_counts: list[int] | None) -> int:
        """Image tokens of the batch, which are read from the device unless `media_counts` says them."""
        # replicas of one process get a part of the rows, but all of the numbers
        if media_counts is not None and len(media_counts) == input_ids.shape[0]:
            return sum(media_counts)
        return int((input_ids == self.config.image_token_id).sum())

    def _find_patches(self, input_ids, inputs_embeds, patches, media_counts: list[int] | None) -> torch.Tensor:
        """`(B, L, D)` bool, True where `patches (1, N, D)` go. Raises ValueError where they do not fit in number."""
        if input_ids is None or media_counts is None:
            return self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=patches)
        count = self._count_patches(input_ids, media_counts)
        if count != patches.shape[1]:
            raise ValueError(
                f"input_ids holds {count} image tokens but pixel_values {patches.shape[1]} patches: pass input_ids "
                "and pixel_values of one processor call."
            )
        return (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)


def _put_patches(inputs_embeds: torch.Tensor, patches: torch.Tensor, is_patch: torch.Tensor) -> torch.Tensor:
    """
    `inputs_embeds (B, L, D)` with `patches (N, D)`, in their order, where `is_patch (B, L, 1 or D)`. The backward pass
    of `masked_scatter` would have the host wait for a GPU.
    """
    if not len(patches):
        return inputs_embeds + patches.sum(dim=0)  # ranks of a distributed run wait for the gradient
    here = is_patch[..., 0].flatten()
    # text points at patches as well, at all in turn: their gradients of zero do not queue for the same one
    anywhere = torch.arange(len(here), device=here.device) % len(patches)
    places = torch.where(here, here.cumsum(0) - 1, anywhere)
    return torch.where(is_patch, patches[places].view_as(inputs_embeds), inputs_embeds)


class OtterHDForConditionalGeneration(OtterHDPreTrainedModel, OtterHDGenerationMixin, FuyuForCausalLM):
    """
    OtterHD with its language modeling head.

    Differences from `FuyuForCausalLM` of transformers: in training the head runs on supervised positions only, image
    inputs follow `num_beams` and `num_return_sequences`, the list inputs of 2023 are accepted, and what does not fit
    is refused by name.
    """

    def __init__(self, config: OtterHDConfig):
        FuyuPreTrainedModel.__init__(self, config)
        self.model = OtterHDModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_patches: list[torch.Tensor] | torch.Tensor | None = None,
        image_patches_indices: torch.LongTensor | None = None,
        target_count: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutputWithPast:
        r"""
        Args:
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                image_grid_thw: see [`OtterHDModel`].
            labels (`torch.LongTensor` of shape `(B, L)`): targets, shifted inside, -100 where there is none. The first
                position of each packed sample must be -100.
            skip_logits (`bool`, *optional*): with `labels`, compute the loss from the supervised positions alone and
                return no logits (a full row of logits takes a vocabulary of 262,144 numbers). Defaults to `True` while
                training and `False` in evaluation; the loss is the same.
            image_patches (`list[torch.Tensor]` of shapes `(1, n_i, patch_size * patch_size * num_channels)`): the
                patches of each row as the processors of 2023 returned them; a tensor is taken for `pixel_values`.
            image_patches_indices (`torch.LongTensor`): what came with the list in 2023; implied by `input_ids`.
            target_count (`int`): number of labels, if the host knows it; see `known_on_host`.

        Raises:
            ValueError: as [`OtterHDModel`], and when a row of `image_patches` does not match its image tokens.
        """
        if image_patches is not None:
            pixel_values = self._flatten_image_patches(image_patches, input_ids)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = in_dtype_of(self.lm_head.weight, outputs.last_hidden_state)  # (B, L, D)
        loss = logits = None
        if labels is not None and (self.training if skip_logits is None else skip_logits):
            vocab_size = self.config.text_config.vocab_size
            loss = supervised_loss(
                self.lm_head, hidden_states, labels, vocab_size=vocab_size, target_count=target_count, **kwargs
            )
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))  # (B, kept, V)
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in the parent class; the rows asked for are then those of the tokenizer."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None and self.config.tokenizer_vocab_size is not None:
            self.config.tokenizer_vocab_size = new_num_tokens
        return embeddings

    def _flatten_image_patches(self, image_patches, input_ids: torch.LongTensor) -> torch.FloatTensor:
        """`pixel_values` from the image inputs of 2023; checks the count of each row."""
        if isinstance(image_patches, torch.Tensor):
            return image_patches
        rows = [row.reshape(-1, row.shape[-1]) for row in image_patches]
        counts = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
        if len(rows) != len(counts):
            raise ValueError(f"image_patches has {len(rows)} entries for {len(counts)} rows: give one per row.")
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if len(row) != count:
                raise ValueError(
                    f"Row {index} has {count} image tokens in input_ids but {len(row)} patches in image_patches: give "
                    "each row the patches of its own images."
                )
        return torch.cat(rows)


class _FirstRevisionName(WeightRenaming):
    """A name of adept/fuyu-8b's first revision: read, but not written back, since transformers cannot read it."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return self.copy(self._original_target_patterns, self._original_target_patterns)


register_checkpoint_conversion_mapping(
    OtterHDConfig.model_type,
    get_checkpoint_conversion_mapping(OtterHDConfig.model_type)
    + [
        _FirstRevisionName(rf"^model\.{name}", f"model.language_model.{name}")
        for name in ("embed_tokens", "final_layernorm", "layers")
    ],
    overwrite=True,
)

__all__ = ["OtterHDForConditionalGeneration", "OtterHDModel", "OtterHDPreTrainedModel"]
