"""How `generate` feeds a Flamingo: new images on an old cache, an explicit `media_index`, no generated `<image>`."""

import functools

import torch
from transformers.generation import GenerationConfig
from transformers.utils import logging

from ..generation import ImageTextGenerationMixin
from ..media_attention import batch_first_media, media_behind, running_media_index
from ..media_cache import with_media
from .media_flamingo import check_frame_mask, check_latents


logger = logging.get_logger(__name__)

# argument names of the 2023 code -> ours
_LEGACY_ARGUMENTS = {"vision_x": "pixel_values", "lang_x": "input_ids"}
# their order then
_LEGACY_ORDER = ("vision_x", "lang_x", "attention_mask", "labels")


def accept_legacy_arguments(method):
    """
    Let a method also take `vision_x` and `lang_x`, the argument names of 2023, with one deprecation warning; by
    position too, as then: pictures, text, its mask.
    """

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() in (5, 6):  # text has two dimensions
            if len(args) > len(_LEGACY_ORDER):
                raise ValueError(f"Only {', '.join(_LEGACY_ORDER)} go by position; name the arguments behind them.")
            for name, value in zip(_LEGACY_ORDER, args, strict=False):
                if kwargs.setdefault(name, value) is not value:
                    raise ValueError(f"{name} is given twice, by position and by name.")
            args = ()
        for old in _LEGACY_ARGUMENTS.keys() & kwargs.keys():
            new = _LEGACY_ARGUMENTS[old]
            if kwargs.get(new) is not None:
                raise ValueError(f"Both {new} and {old}, its name in 2023, are given; pass {new} only.")
            logger.warning_once("The arguments vision_x and lang_x are deprecated; use pixel_values and input_ids.")
            kwargs[new] = kwargs.pop(old)
        return method(self, *args, **kwargs)

    return wrapper


class FlamingoGenerationMixin(ImageTextGenerationMixin):
    """What generation with images needs beyond [`~transformers.GenerationMixin`]."""

    @accept_legacy_arguments
    def generate(self, inputs=None, *args, **kwargs):
        """
        As in the parent class, with `pixel_values (B, T, F, C, H, W)` or `image_hidden_states (B, T, n, D)`,
        `pixel_attention_mask (B, T, F)` and, optionally, `media_index (B, L)` of the prompt; a generated token sees
        what the last token of the prompt sees.

        A chat continued on `past_key_values` may pass the images of the whole conversation, as a processor makes them,
        or only the new ones.

        Raises:
            ValueError: for media without an `<image>`, as where a prompt was cut, if no `media_index` says who sees
                them. What `pixel_attention_mask` leaves out is padding. Without it, the media of a row that has fewer
                `<image>` than others are, and in a call without any mask, as in 2023, all behind those referred to.
        """
        given = (kwargs.get("pixel_values"), kwargs.get("image_hidden_states"))
        if given != (None, None) and kwargs.get("media_index") is None:
            self._refuse_surplus_media(inputs, **kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _refuse_surplus_media(
        self,
        inputs,
        pixel_values=None,
        pixel_attention_mask=None,
        image_hidden_states=None,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        **kwargs,
    ) -> None:
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                f"There are media but no prompt: pass input_ids with one `<image>` (id {self.config.image_token_id}) "
                "for each."
            )
        is_media = self.model._find_media_tokens(input_ids, inputs_embeds)
        total = is_media.sum(dim=1)  # (B,)
        seen = getattr(past_key_values, "media_seen", None)
        if seen is not None:
            seen = seen[:: max(1, len(seen) // len(total))].to(total.device)  # with beams a row's come so many times
            if inputs_embeds is None and attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]:
                total = total + seen  # the mask is of the whole prompt, input_ids of what is new
        new = total if seen is None else total - seen
        if image_hidden_states is not None:
            check_latents(image_hidden_states, pixel_values, pixel_attention_mask, len(total), self.config)
            media = image_hidden_states
        else:
            media = batch_first_media(pixel_values, len(total))
            if pixel_attention_mask is not None:
                check_frame_mask(pixel_attention_mask, media)
        num_media = media.shape[1]
        if pixel_attention_mask is not None:
            given = pixel_attention_mask.bool().any(dim=2).sum(dim=1).to(total.device)  # (B,)
            wrong = (given > total) | ((given > new) & (given < total))
        else:
            wanted = total if num_media >= total.max() else new
            is_used = media[:, int(wanted.max()) :].any() and (attention_mask is not None or not wanted.any())
            given, wrong = torch.full_like(total, num_media), torch.full_like(total, bool(is_used)).bool()
        if wrong.any():
            row = int(wrong.nonzero()[0])
            name = "pixel_values" if image_hidden_states is None else "image_hidden_states"
            raise ValueError(
                f"{name} holds {int(given[row])} media for row {row} of the prompt, which has {int(new[row])} "
                "new `<image>`; pass one for each (was the prompt cut?), or say with media_index who sees them."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,
        media_index=None,
        pixel_values=None,
        is_first_iteration=False,
        pixel_attention_mask=None,
        image_hidden_states=None,
        **kwargs,
    ):
        """As in the parent class; see `generate` for `media_index` and the media."""
        if is_first_iteration and next_sequence_length is None and inputs_embeds is None:
            next_sequence_length = self._unread_length(input_ids, past_key_values, kwargs.get("position_ids"))
        if pixel_values is not None:
            pixel_values = batch_first_media(pixel_values, input_ids.shape[0])
        media = {"pixel_values": pixel_values, "image_hidden_states": image_hidden_states}
        media = {name: value for name, value in media.items() if value is not None}
        if media and pixel_attention_mask is not None:
            media["pixel_attention_mask"] = pixel_attention_mask
        if is_first_iteration and media and past_key_values is not None:
            is_media = self.model._find_media_tokens(input_ids if inputs_embeds is None else None, inputs_embeds)
            media = self._new_media(is_media.sum(dim=1), media, past_key_values, next_sequence_length is None)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # the assistant of assisted decoding gets no first iteration, which is when images are passed on
        # (a static cache counts its tokens in a tensor, which no step shall read)
        cached = past_key_values is not None and kwargs.get("use_cache", True)
        if is_first_iteration or not cached or getattr(past_key_values, "media_index", self) is None:
            inputs |= media
        if media_index is not None:
            # candidates of assisted decoding are not in it yet
            missing = max(0, input_ids.shape[1] - media_index.shape[1])
            media_index = torch.cat([media_index, media_index[:, -1:].expand(-1, missing)], dim=1)
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            inputs["media_index"] = media_index[:, -tokens.shape[1] :]
        return inputs

    def _new_media(self, total: torch.Tensor, media: dict, past_key_values, is_new: bool) -> dict:
        """
        Those of `media`, each `(B, T, ...)`, that a cache does not hold yet, aligned to the left. `total (B,)` is the
        number that each prompt refers to, which is the whole one or only what is new of it.
        """
        seen = getattr(past_key_values, "media_seen", None)
        if seen is None:
            return media
        total = total + seen if is_new else total
        num_media = next(iter(media.values())).shape[1]
        if (mask := media.get("pixel_attention_mask")) is None:
            whole = num_media >= int(total.max())
        else:
            whole = bool((mask.bool().any(dim=2).sum(dim=1) == total).all())
        if not whole:
            return media  # only the new ones
        return media_behind(media, seen, total - seen)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """As in the parent class; media are encoded once for all answers to a row, not again for each of them."""
        pixel_values, cache = model_kwargs.get("pixel_values"), model_kwargs.get("past_key_values")
        # those of a cache with media are told apart later
        if expand_size > 1 and pixel_values is not None and getattr(cache, "media_seen", None) is None:
            media_index, embeds = model_kwargs.get("media_index"), model_kwargs.get("inputs_embeds")
            explicit = media_index is not None
            if not explicit:
                is_media = self.model._find_media_tokens(input_ids if embeds is None else None, embeds)
                media_index = running_media_index(is_media)
            model_kwargs["image_hidden_states"] = self.model._encode_media(
                pixel_values.to(self.device),
                model_kwargs.get("pixel_attention_mask"),
                None,
                media_index,
                explicit=explicit,
                blank=False,
            )
            del model_kwargs["pixel_values"]
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

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

    def adjust_generation_fn(self, *args, **kwargs):
        """As in the parent class."""
        super().adjust_generation_fn(*args, **kwargs)
        # Nobody wrote this one, as in the 2023 repositories: it repeats defaults of the text model at that time, such
        # as a length of 20 tokens and no cache, and does not know where an answer ends.
        if self.generation_config._from_model_config:
            self.generation_config = GenerationConfig.from_model_config(self.config)
