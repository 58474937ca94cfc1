"""How `generate` feeds an OtterHD: patches, which have no row axis, follow their tokens."""

import torch

from ..generation import ImageTextGenerationMixin


def patches_between(is_patch: torch.Tensor, patches: torch.Tensor, start: int, end: int | None = None) -> torch.Tensor:
    """Of `patches (N, width)`, row by row in the order of their tokens `is_patch (B, L)`, those of some columns."""
    is_wanted = torch.zeros_like(is_patch)
    is_wanted[:, start:end] = True
    return patches[is_wanted[is_patch].to(patches.device)]


class OtterHDGenerationMixin(ImageTextGenerationMixin):
    """What generation with patches needs beyond [`~transformers.GenerationMixin`]."""

    def generate(self, *args, **kwargs):
        """
        As in the parent class, with `pixel_values (N, patch_size ** 2 * 3)`, the patches of all rows.

        A chat continued on `past_key_values` may pass the patches of the whole conversation, as a processor makes
        them, or only those of the new images.

        Raises:
            ValueError: if image tokens and patches do not match in number.
        """
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """As in the parent class; see `generate` for `pixel_values`."""
        if is_first_iteration and next_sequence_length is None and inputs_embeds is None:
            next_sequence_length = self._unread_length(input_ids, past_key_values, kwargs.get("position_ids"))
        # the assistant of assisted decoding gets no first iteration, which is when images are passed on
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        first = is_first_iteration or (past_key_values is not None and seen == 0)
        if first and seen and pixel_values is not None:
            # without a length to cut, input_ids are what is new
            start = 0 if next_sequence_length is None else seen
            pixel_values = self._new_patches(input_ids, inputs_embeds, pixel_values, start)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if first and pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _new_patches(self, input_ids, inputs_embeds, pixel_values, start: int) -> torch.Tensor | None:
        """The patches of tokens from `start` on, which a cache does not hold yet; see `generate`."""
        is_patch = self._find_patches(input_ids, inputs_embeds)  # (B, L)
        pixel_values = pixel_values.reshape(-1, pixel_values.shape[-1])  # (N, patch width)
        if len(pixel_values) == int(is_patch.sum()):
            pixel_values = patches_between(is_patch, pixel_values, start)
        return pixel_values if len(pixel_values) else None

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats each row `expand_size` times; patches have no row axis, so they are regrouped by their tokens."""
        if model_kwargs.get("image_patches") is not None:
            model_kwargs["pixel_values"] = self._flatten_image_patches(model_kwargs.pop("image_patches"), input_ids)
        model_kwargs.pop("image_patches_indices", None)
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            pixel_values = pixel_values.reshape(-1, pixel_values.shape[-1])  # (N, patch width)
            counts = self._find_patches(input_ids, model_kwargs.get("inputs_embeds")).sum(dim=1).tolist()
            if sum(counts) != len(pixel_values):
                raise ValueError(
                    f"The prompts hold {sum(counts)} image tokens but pixel_values {len(pixel_values)} patches: pass "
                    "input_ids and pixel_values of one processor call."
                )
            pixel_values = torch.cat([row for row in pixel_values.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _find_patches(self, input_ids, inputs_embeds) -> torch.Tensor:
        """`(B, L)` bool, True at the tokens of patches."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(dim=-1)
