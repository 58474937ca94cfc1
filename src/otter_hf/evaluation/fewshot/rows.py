"""Training and test rows of the few-shot data sets, whatever their columns are called."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...made_from import state_of_all
from ..benchmarks import images, with_paths
from ..data_sources import picture_places, read_split
from ..published import read_published_fewshot


# our name -> names it has in common copies of the data
_COLUMNS = {
    "id": ("question_id", "image_id", "img_id", "id"),
    "image": ("image", "img", "image_path"),
    "question": ("question", "instruction"),
    "answers": ("answers", "answer"),
    "answer_type": ("answer_type",),
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
_TRUTHS = {"answers", "captions", "label"}


class Rows:
    """
    Rows under our names; pictures are read when a row is, and the last ones are kept, as demonstrations come back.

    Args:
        source: a file, a folder or a Hub id; also what [`~otter_hf.evaluation.published`] reads.
        split: of the data set.
        kind: of `NEEDED`.
        image_dir: folder of the pictures, where the rows hold file names; by default that of the data.
        columns: our name -> the name in the data, over the common ones.

    Raises:
        ValueError: for a column that is missing, naming those that are there, and for a row without its answers,
            captions or label, as splits have them whose truth is kept back.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        split: str,
        kind: str,
        image_dir: str | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        self._table = _table(source, split, image_dir)
        self._place = picture_places(None if isinstance(source, Mapping) else str(source), image_dir)
        there = self._table.column_names
        chosen = {name: next((c for c in names if c in there), None) for name, names in _COLUMNS.items()}
        self._columns = {name: column for name, column in {**chosen, **(columns or {})}.items() if column in there}
        if missing := [name for name in NEEDED[kind] if name not in self._columns]:
            raise ValueError(
                f"{source} has no column for {missing[0]!r}; it has {', '.join(there)}. Say which one it is with "
                f"`columns: {{{missing[0]}: NAME}}`."
            )
        # one column may have two of our names
        texts = {column: None for name, column in self._columns.items() if name not in ("id", "image")}
        self._texts = self._table.select_columns([*texts])
        self._source = source
        for name in _TRUTHS & {*NEEDED[kind]}:
            self._check_filled(name)
        self._read = lru_cache(maxsize=1024)(self._read_row)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """
        `number`, `id`, `image` (PIL, RGB), and of `question`, `answers`, `answer_type`, `captions`, `label` and `text`
        what there is.
        """
        return self._read(number)

    def state(self) -> list:
        """What tells whether the rows and the files of their pictures are still the same, as JSON."""
        from datasets import Value

        pictures = self._table.select_columns([self._columns["image"]])
        if pictures.features[self._columns["image"]] != Value("string"):
            return [self._table._fingerprint]
        names = pictures[self._columns["image"]]
        return [self._table._fingerprint, state_of_all(Path(self._place(name)) for name in names if name)]

    def is_row_of(self, number: int, other: "Rows", other_number: int) -> bool:
        """
        Whether a row is one of another table: the same texts and the same pixels, whatever ids and files they have.
        Pictures are read where the texts are the same.
        """
        mine, theirs = self._texts[number], other._texts[other_number]
        if [mine[self._columns[name]] for name in self._shared(other)] != [
            theirs[other._columns[name]] for name in self._shared(other)
        ]:
            return False
        picture, other_picture = self[number]["image"], other[other_number]["image"]
        return picture.size == other_picture.size and picture.tobytes() == other_picture.tobytes()

    def _shared(self, other: "Rows") -> list[str]:
        return [name for name in self._columns if name in other._columns and name not in ("id", "image")]

    def class_names(self) -> list[str] | None:
        """The names of the labels, where the data set holds them."""
        return getattr(self._table.features.get(self._columns.get("label")), "names", None)

    def check_labels(self, count: int) -> None:
        """Raises ValueError for a label that is none of so many classes, such as the -1 of what is not told."""
        column = self._columns["label"]
        for number, label in enumerate(self._texts[column]):
            if not (str(label).isdecimal() and int(label) < count) and not isinstance(label, bool):
                raise ValueError(
                    f"Row {number} of {self._source} has the {column} {label!r}, which is none of {count} classes: "
                    "take a split in which they are told."
                )

    def _check_filled(self, name: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self._texts.data.column(self._columns[name])
        is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        empty = pc.fill_null(pc.equal(pc.list_value_length(values), 0), True) if is_list else pc.is_null(values)
        if pc.any(empty).as_py():
            number = pc.index(empty, True).as_py()
            raise ValueError(f"Row {number} of {self._source} has no {name}: take a split in which they are told.")

    def _read_row(self, number: int) -> dict[str, Any]:
        raw = self._table[number]
        row = {name: raw[column] for name, column in self._columns.items()}
        picture = {"image": row["image"], "id": row.get("id", number)}
        row["image"] = images(with_paths(picture, self._place))[0]
        for name in ("answers", "captions"):
            if name in row:
                row[name] = _texts(row[name])
        return {"id": number, **row, "number": number}


def _table(source: str | Mapping, split: str, image_dir: str | None):
    from datasets import Dataset

    if (rows := read_published_fewshot(source, split, image_dir)) is not None:
        if not rows:
            raise ValueError(f"{source} has no rows of the split {split!r}.")
        return Dataset.from_list(rows)
    return read_split(str(source), split)


def _texts(cell) -> list[str]:
    """A text, a list of them, or of VQA's `{"answer": ..}` and Karpathy's `{"raw": ..}`."""
    cells = cell if isinstance(cell, list) else [cell]
    return [str(c.get("answer", c.get("raw"))) if isinstance(c, Mapping) else str(c) for c in cells]
