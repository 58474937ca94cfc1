"""Sets of pictures in folders: LLaVA, scene navigation, spot the difference, COCO general difference."""

from collections.abc import Iterator

from ...data.image_store import natural_order
from ...data.json_stream import iter_json_object
from ...reading import leads_out
from ...storage import AnyPath
from .base import PICTURE_SUFFIXES, Converter, LeftOut, Source


class _OneFile(Converter):
    """A picture per source, under the source's name."""

    sources_per_shard = 2000

    def read(self, source: Source) -> Iterator[tuple[str, AnyPath]]:
        yield source.name, source.place


class Llava(_OneFile):
    """COCO pictures of LLaVA-Instruct: the keys of a JSON object name files `<image_root>/<key>.jpg`."""

    short_name, original_name = "LA", "2d.Llava"
    expects = "a JSON object whose keys are COCO ids, and the folder of the pictures as image_root"

    def sources(self) -> Iterator[Source]:
        if self.image_root is None:
            raise ValueError("LA needs image_root, the folder of the COCO pictures (train2017).")
        for id, _ in iter_json_object(self.image_path):
            yield Source(id, self.image_root / f"{id}.jpg")

    def read(self, source: Source) -> Iterator[tuple[str, AnyPath]]:
        if leads_out(source.name):
            raise LeftOut("missing", f"{source.name!r:.80} leads out of {self.image_root}")
        yield from super().read(source)


class SceneNavigation(_OneFile):
    """Colour frames of the first scan of each ScanNet scene: `scene*_00/color/*`, all of them."""

    short_name, original_name = "SN", "3d.SceneNavigation"
    expects = "the ScanNet folder with scene*_00/color in it"

    def sources(self) -> Iterator[Source]:
        for scene in sorted(self.image_path.glob("scene*_00")):
            for path in _pictures(scene / "color"):
                yield Source(f"{scene.name}_color_{path.stem}", path)


class CocoGeneralDifference(_OneFile):
    """Every file of a folder of COCO pictures, under its name without suffix."""

    short_name, original_name = "CGD", "change.CocoGeneralDifference"
    expects = "a folder of pictures"

    def sources(self) -> Iterator[Source]:
        for path in sorted(self.image_path.iterdir(), key=natural_order):
            if path.is_file():
                yield Source(path.stem, path)


class SpotTheDifference(Converter):
    """Pairs `<id>.ext` and `<id>_2.ext`, as `<id of 5 digits>_1` and `_2`; both have to be there.

    The set as it is published also has `<id>_diff.jpg`, the marked difference, which is no picture of the pair.
    """

    short_name, original_name = "SD", "change.SpotTheDifference"
    expects = "a folder with pairs of pictures <id>.png and <id>_2.png"

    def sources(self) -> Iterator[Source]:
        pairs: dict[str, list[AnyPath | None]] = {}
        for path in _pictures(self.image_path):
            id, second = path.stem, 0
            if id.endswith("_diff"):
                continue
            if id.endswith("_2"):
                id, second = id.removesuffix("_2"), 1
            pair = pairs.setdefault(id.zfill(5), [None, None])
            if pair[second] is not None:
                raise ValueError(f"SD: {pair[second]} and {path} are the same picture of a pair: remove one.")
            pair[second] = path
        for name, pair in pairs.items():
            yield Source(name, tuple(pair))

    def read(self, source: Source) -> Iterator[tuple[str, AnyPath]]:
        if None in source.place:
            present = next(path for path in source.place if path)
            raise LeftOut("missing", f"{present.name} has no other picture beside it")
        for number, path in enumerate(source.place, start=1):
            yield f"{source.name}_{number}", path


def _pictures(folder: AnyPath) -> list[AnyPath]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES), key=natural_order)
