"""Pictures and videos of public sets to MIMIC-IT image stores, with the ids of the originals.

Follows convert-it of the Otter repository, https://github.com/Luodian/Otter, in names and ids; see `convert` for what
is different.
"""

from .base import Converter, LeftOut, Source
from .pictures import CocoGeneralDifference, Llava, SceneNavigation, SpotTheDifference
from .storytelling import VisualStoryTelling
from .videos import DenseCaptions, Ego4D, TVCaptions
from .writer import StoreReport, convert


CONVERTERS: dict[str, type[Converter]] = {
    converter.short_name: converter
    for converter in (
        Llava,
        DenseCaptions,
        TVCaptions,
        VisualStoryTelling,
        SceneNavigation,
        SpotTheDifference,
        CocoGeneralDifference,
        Ego4D,
    )
}


def find_converter(name: str) -> type[Converter]:
    """The converter of a short name such as `"DC"`, or of the original's name such as `"video.DenseCaptions"`."""
    for converter in CONVERTERS.values():
        if name in (converter.short_name, converter.original_name):
            return converter
    known = ", ".join(f"{converter.short_name} ({converter.original_name})" for converter in CONVERTERS.values())
    raise ValueError(f"There is no converter {name!r}; there are {known}.")


__all__ = [
    "CONVERTERS",
    "CocoGeneralDifference",
    "StoreReport",
    "Converter",
    "DenseCaptions",
    "Ego4D",
    "LeftOut",
    "Llava",
    "SceneNavigation",
    "Source",
    "SpotTheDifference",
    "TVCaptions",
    "VisualStoryTelling",
    "convert",
    "find_converter",
]
