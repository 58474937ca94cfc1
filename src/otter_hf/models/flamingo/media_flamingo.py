"""
From pixels to latents: which media are referred to, which of their frames are there, and what these become.

Media of a batch differ in their number of frames, a picture having one. `pixel_values` is padded to the longest, but
only real frames go through the vision tower, all at once, and the resampler sees no others: what a row gives does not
depend on what else is in the batch.

Shape legend: B rows, L text tokens, T media of a row, N = B*T, F frames of the longest medium, S frames that are
encoded, v vision tokens of one frame, n latents of one medium, D vision width.
"""

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..host_reads import numbers_on
from ..media_attention import batch_first_media
from ..mixed_dtypes import dtype_of


class FlamingoMediaMixin:
    """The media of a [`FlamingoModel`], which has `vision_tower` and `perceiver`."""

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encode media, each by itself.

        The vision tower's last hidden state feeds the resampler, without its final norm and class token, as in the
        2023 code (open_clip up to 2.22).

        Args:
            pixel_values: `(N, F, C, H, W)`, or `(N, C, H, W)` for images.
            pixel_attention_mask: `(N, F)`, 1 for frames, 0 for padding; by default all are frames.
            kwargs: handed to the vision tower.

        Returns:
            the vision tower's output, with `last_hidden_state` of the S frames, media with fewer frames first;
            `pooler_output` is `(N, n, D)`, the latents that text attends to, zeros for a medium without frames.

        Raises:
            ValueError: if the mask has another shape or tells of no frame at all.
        """
        if pixel_values.ndim == 4:
            pixel_values = pixel_values[:, None]
        frame_counts = None
        if pixel_attention_mask is None:
            frame_counts = [pixel_values.shape[1]] * pixel_values.shape[0]
        else:
            pixel_attention_mask = check_frame_mask(pixel_attention_mask, pixel_values)
            if not is_torchdynamo_compiling():
                frame_counts = pixel_attention_mask.sum(dim=1).tolist()
                if not any(frame_counts):
                    raise ValueError("pixel_attention_mask has no frame: it is 0 everywhere; leave both inputs out.")
        return self._encode_frames(pixel_values, pixel_attention_mask, frame_counts, **kwargs)

    def _encode_frames(self, pixel_values, frame_mask, frame_counts: list[int] | None, **kwargs):
        """
        As `get_image_features`, of the first `frame_counts[i]` frames that medium `i` has in the mask. None (while
        compiling, when nothing can be read back) encodes all and hides the padding from the resampler.
        """
        num_media, longest = pixel_values.shape[:2]
        encoded = range(num_media)
        if frame_counts is None or all(count == longest for count in frame_counts):
            frames = pixel_values.flatten(0, 1)
        else:
            # the resampler works on runs of media of one length
            encoded = sorted((i for i in range(num_media) if frame_counts[i]), key=frame_counts.__getitem__)
            places = [(i, k) for i in encoded for k in range(frame_counts[i])]
            media, place = numbers_on(pixel_values.device, places).unbind(1)  # (S,) each
            if frame_mask is not None:
                place = (~frame_mask).to(torch.uint8).argsort(dim=1, stable=True)[media, place]  # real frames first
            frames = pixel_values[media, place]
        outputs = self.vision_tower(frames.to(dtype_of(self.vision_tower)), return_dict=True, **kwargs)
        features = outputs.last_hidden_state
        if features.ndim == 4:
            features = features.flatten(2).transpose(1, 2)  # (S, D, h, w) -> (S, v, D)
        elif self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        if frame_counts is None:
            # one frame is a picture or unseen
            hiding = {} if longest == 1 else {"frame_mask": frame_mask}
            latents = self.perceiver(features.unflatten(0, (num_media, -1)), **hiding)
        elif len({frame_counts[i] for i in encoded}) == 1:
            latents = self.perceiver(features.unflatten(0, (len(encoded), -1)))
        else:
            latents = self.perceiver(features, frame_counts=[frame_counts[i] for i in encoded])
        if list(encoded) != list(range(num_media)):
            at = numbers_on(latents.device, encoded)
            latents = latents.new_zeros(num_media, *latents.shape[1:]).index_put((at,), latents)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=latents,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),  # convolutional towers have none
        )

    def _encode_media(
        self,
        pixel_values,
        pixel_attention_mask,
        image_hidden_states,
        new_index,
        explicit: bool,
        blank: bool,
        known: tuple | None = None,
    ) -> torch.Tensor | None:
        """
        The latents `(B, T, n, D)` of a batch; zeros for media that no token refers to. None without any.

        Args:
            pixel_values, pixel_attention_mask, image_hidden_states: as in `FlamingoModel.forward`.
            new_index: `(B, L)`, the medium in `pixel_values` each token sees, from 1.
            explicit: whether the caller said so, and may leave out what it wants.
            blank: whether a medium that no token sees stands in where there is none.
            known: what the host knows: the media that each row refers to, and the frames of each medium of each row.
        """
        if image_hidden_states is not None:
            check_latents(image_hidden_states, pixel_values, pixel_attention_mask, new_index.shape[0], self.config)
            if not is_torchdynamo_compiling():
                _count_frames(image_hidden_states, pixel_attention_mask, new_index, explicit, known)
            return image_hidden_states
        if pixel_values is not None:
            pixel_values = batch_first_media(pixel_values, new_index.shape[0])
            if pixel_attention_mask is not None:
                pixel_attention_mask = check_frame_mask(pixel_attention_mask, pixel_values)
        elif blank:
            pixel_values, pixel_attention_mask = self._blank_media(new_index), None
        frame_counts = None
        if not is_torchdynamo_compiling():
            frame_counts = _count_frames(pixel_values, pixel_attention_mask, new_index, explicit, known)
        if pixel_values is None:
            return None
        if pixel_attention_mask is not None:
            pixel_attention_mask = pixel_attention_mask.flatten(0, 1)
        features = self._encode_frames(pixel_values.flatten(0, 1), pixel_attention_mask, frame_counts)
        return features.pooler_output.unflatten(0, pixel_values.shape[:2])

    def _blank_media(self, media_index: torch.Tensor) -> torch.Tensor:
        """
        One black medium per row that no token sees. A training step without any image runs the same modules as the
        others all the same, with gradients of 0: ranks of a distributed run would wait for each other for ever.
        """
        config = self.config.vision_config
        size = getattr(config, "image_size", 224)  # convolutional towers take any
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (media_index.shape[0], 1, 1, config.num_channels, height, width)
        return torch.zeros(shape, device=media_index.device)


def check_frame_mask(pixel_attention_mask: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """The mask as bool; ValueError unless it has one number per frame of `pixel_values (..., C, H, W)`."""
    expected = tuple(pixel_values.shape[:-3])
    if tuple(pixel_attention_mask.shape) != expected:
        raise ValueError(
            f"pixel_attention_mask has shape {tuple(pixel_attention_mask.shape)}; expected {expected}, one number per "
            "frame of pixel_values."
        )
    return pixel_attention_mask.bool()


def check_latents(image_hidden_states, pixel_values, pixel_attention_mask, batch_size: int, config) -> None:
    """ValueError unless these are latents `(B, T, n, D)` of a model of this configuration, in place of pixels."""
    if pixel_values is not None:
        raise ValueError("Give either pixel_values or image_hidden_states, what they were encoded to, not both.")
    # latents are as wide as what the tower gives
    expected = (config.perceiver_num_latents, config.vision_hidden_size)
    shape = tuple(image_hidden_states.shape)
    if len(shape) != 4 or shape[0] != batch_size or shape[2:] != expected:
        raise ValueError(
            f"image_hidden_states has shape {shape}; expected {(batch_size, 'T', *expected)}: rows of input_ids, "
            "media of a row, latents of a medium, their width."
        )
    if pixel_attention_mask is not None and tuple(pixel_attention_mask.shape[:2]) != shape[:2]:
        raise ValueError(
            f"pixel_attention_mask has shape {tuple(pixel_attention_mask.shape)}; expected {(*shape[:2], 'F')}, the "
            "frames of each medium of image_hidden_states."
        )


def _count_frames(media, pixel_attention_mask, new_index, explicit: bool, known: tuple | None = None) -> list[int]:
    """
    How many frames of each of the B*T media are to be encoded: all of those that a token refers to, no others. Waits
    for the device once, unless all that is needed is `known`, see `_encode_media`. `media` are pixels or latents.

    Raises:
        ValueError: where rows refer to more media than they have, or have more than they refer to.
    """
    num_media, longest = (0, 0) if media is None else media.shape[1:3]
    referenced, frame_counts = known or (None, None)
    if pixel_attention_mask is None:
        frame_counts = [[longest] * num_media] * len(new_index)
    # replicas of one process get a part of the rows, but all of the numbers
    if any(counts is None or len(counts) != len(new_index) for counts in (referenced, frame_counts)):
        table = new_index.amax(dim=1, keepdim=True)  # (B, 1)
        if pixel_attention_mask is not None:
            table = torch.cat([table, pixel_attention_mask.sum(dim=2).to(table.device)], dim=1)  # (B, 1 + T)
        table = table.tolist()
        referenced = [row[0] for row in table]
        if pixel_attention_mask is not None:
            frame_counts = [row[1:] for row in table]
    encoded = []
    for row, (wanted, counts) in enumerate(zip(referenced, frame_counts, strict=True)):
        given = counts.index(0) if 0 in counts else num_media
        surplus = pixel_attention_mask is not None and not explicit and sum(map(bool, counts)) > wanted
        if wanted > given or surplus:
            given_as = "image_hidden_states" if media is not None and media.ndim == 4 else "pixel_values"
            source = given_as if pixel_attention_mask is None else "pixel_attention_mask"
            raise ValueError(
                f"input_ids row {row} refers to {wanted} new media, but {source} holds {given} for it; pass one image "
                "per `<image>` token."
            )
        encoded += [count if i < wanted else 0 for i, count in enumerate(counts)]
    if encoded and not any(encoded):
        # at least one medium is always encoded: in distributed training every rank must run the same modules
        encoded[0] = 1
    return encoded
