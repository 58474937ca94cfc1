"""Pictures and films that a processor has made ready once, to stand in any number of messages."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class PreparedMedium:
    """
    A picture or film as `processor.prepare_media` made it: in its place in a message it is neither read nor resized
    again. Processors of the same family and options take it.

    Args:
        pixels: for Otter and Flamingo `(F, C, H, W)`, a picture having one frame; for OtterHD its patches
            `(N, patch width)`.
        grid: for OtterHD rows and columns of patches.
        scale: for OtterHD the vertical and horizontal scale at which the picture is read, for locations in it.
    """

    pixels: torch.Tensor
    grid: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None

    def __len__(self) -> int:
        """Frames, or patches."""
        return len(self.pixels)

    def equals(self, pixels: torch.Tensor) -> bool:
        """Whether these are its pixels, in the dtype in which it keeps them."""
        return pixels.shape == self.pixels.shape and torch.equal(
            pixels.to(self.pixels.dtype), self.pixels.to(pixels.device)
        )


def check_prepared(media: list[PreparedMedium], pixels_of_one: tuple[int, ...], name: str) -> None:
    """ValueError for prepared media of another processor, told by the shape of a frame or patch."""
    for medium in media:
        if tuple(medium.pixels.shape[1:]) != pixels_of_one:
            raise ValueError(
                f"A prepared picture has {name} of {tuple(medium.pixels.shape[1:])}, but this processor makes them "
                f"{pixels_of_one}: prepare it with this processor (prepare_media)."
            )
