"""Training and test rows of the few-shot data sets, whatever their columns are called."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..benchmarks import images
from ..run import data_source


# our name -> names it has in common copies of the data
_COLUMNS = {
    "id": ("question_id", "image_id", "img_id", "id"),
    "image": ("image", "img", "image_path"),
    "question": ("question", "instruction"),
    "answers": ("answers", "answer"),
    "captions": ("captions", "caption", "answer", "sentences"),
    "label": ("label",),
    "text": ("text", "ocr"),
}
# what each kind of data set must have
NEEDED = {
    "caption": ("image", "captions"),
    "vqa": ("image", "question", "answers"),
    "imagenet": ("image", "label"),
    "hateful_memes": ("image", "text", "label"),
}


class Rows:
    """
    Rows under our names; pictures are read when a row is, and the last ones are kept, as demonstrations come back.

    Args:
        source: a file, a folder or a Hub id.
        split: of the data set.
        kind: of `NEEDED`.
        image_dir: folder of the pictures, where the rows hold file names.
        columns: our name -> the name in the data, over the common ones.

    Raises:
        ValueError: for a column that is missing, naming those that are there.
    """

    def __init__(
        self,
        source: str,
        split: str,
        kind: str,
        image_dir: str | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        from datasets import load_dataset, load_from_disk

        place = data_source(str(source), split)
        if (place["dataset_kwargs"] or {}).get("load_from_disk"):
            self._table = load_from_disk(place["dataset_path"])[split]
        else:
            self._table = load_dataset(place["dataset_path"], split=split, **(place["dataset_kwargs"] or {}))
        self._image_dir = image_dir
        there = self._table.column_names
        chosen = {name: next((c for c in names if c in there), None) for name, names in _COLUMNS.items()}
        self._columns = {name: column for name, column in {**chosen, **(columns or {})}.items() if column in there}
        if missing := [name for name in NEEDED[kind] if name not in self._columns]:
            raise ValueError(
                f"{source} has no column for {missing[0]!r}; it has {', '.join(there)}. Say which one it is with "
                f"`columns: {{{missing[0]}: NAME}}`."
            )
        self.fingerprint = self._table._fingerprint
        self._read = lru_cache(maxsize=1024)(self._read_row)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """
        `number`, `id`, `image` (PIL, RGB), and of `question`, `answers`, `captions`, `label` and `text` what there is.
        """
        return self._read(number)

    def class_names(self) -> list[str] | None:
        """The names of the labels, where the data set holds them."""
        return getattr(self._table.features.get(self._columns.get("label")), "names", None)

    def _read_row(self, number: int) -> dict[str, Any]:
        raw = self._table[number]
        row = {name: raw[column] for name, column in self._columns.items()}
        if isinstance(row["image"], str) and self._image_dir is not None:
            row["image"] = str(Path(self._image_dir) / row["image"])
        row["image"] = images({"image": row["image"], "id": row.get("id", number)})[0]
        for name in ("answers", "captions"):
            if name in row:
                row[name] = _texts(row[name])
        return {"id": number, **row, "number": number}


def _texts(cell) -> list[str]:
    """A text, a list of them, or of VQA's `{"answer": ..}` and Karpathy's `{"raw": ..}`."""
    cells = cell if isinstance(cell, list) else [cell]
    return [str(c.get("answer", c.get("raw"))) if isinstance(c, Mapping) else str(c) for c in cells]
