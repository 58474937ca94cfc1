"""
What an evaluation set shares with training data: pictures that are the same or nearly so, and questions.

A model that was trained on a test picture with its question remembers the answer. Pictures are found again although
they were scaled, stored with loss or slightly changed, but not where they were cut, turned or mirrored.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..films import is_film
from ..pictures import read_image
from ..prompts import RESERVED_TOKENS
from .formats import stream_records
from .image_store import ImageStore
from .mixture_yaml import MixtureEntry, entries_of
from .samples import TEXT_ONLY


# what may differ in one picture: of the 64 bits of its hash, and of the 255 levels of any colour of its thumbnail
MAX_BITS = 6
MAX_LEVELS = 16
_THUMBNAIL = 8
_BATCH = 1024


class Question(NamedTuple):
    """A question and the ids of its pictures."""

    id: str
    question: str
    pictures: Sequence[str]


# hash `(64,)` and thumbnail `(192,)`
Fingerprint = tuple[np.ndarray, np.ndarray]


class Questions(NamedTuple):
    """
    One side of a comparison.

    Args:
        rows: read once, before the pictures are looked at.
        fingerprint: id -> what [`fingerprint`] says of the picture; None for a film, or what cannot be decoded.
    """

    rows: Iterable[Question]
    fingerprint: Callable[[str], Fingerprint | None]


@dataclass
class Overlap:
    """
    What two sets share, in pairs of ids: `(training, evaluation)`.

    Args:
        rows: the same question about the same picture.
        pictures: the same picture.
        questions: for each evaluation row whose question is in the training data, the first such row there.
        compared: how many rows and pictures each side has.
        left_out: films, which are not compared, and pictures that cannot be decoded.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all pairs, as `{"training": id, "evaluation": id}`."""
        kinds = {"rows": self.rows, "pictures": self.pictures, "questions": self.questions}
        pairs = {kind: [{"training": a, "evaluation": b} for a, b in found] for kind, found in kinds.items()}
        return {**pairs, "compared": self.compared, "left_out": self.left_out}

    def table(self, num_shown: int = 3) -> str:
        """For people: a line for each kind, with its first pairs."""
        counts = {name: f"{count:,}" for name, count in self.compared.items()}
        lines = [
            f"compared with {counts['evaluation_rows']} questions about {counts['evaluation_pictures']} pictures: "
            f"{counts['training_rows']} about {counts['training_pictures']} in training"
        ]
        for kind, pairs in (
            ("same question about the same picture", self.rows),
            ("same picture", self.pictures),
            ("same question", self.questions),
        ):
            shown = [f"{evaluation} = {training}" for training, evaluation in pairs[:num_shown]]
            shown += ["..."] if len(pairs) > num_shown else []
            number = len({evaluation for _, evaluation in pairs})
            lines.append(f"{kind}: {number:,}" + (f" ({', '.join(shown)})" if shown else ""))
        if self.left_out:
            lines.append(f"not compared: {self.left_out:,} films, or pictures that cannot be decoded")
        return "\n".join(lines)


def find_overlap(training: Questions, evaluation: Questions, num_threads: int | None = None) -> Overlap:
    """
    Compares training data with an evaluation set.

    Questions are the same if they differ in case, accents' encoding, punctuation, white space and special tokens only,
    and in the words by which LLaVA asks for a short answer.
    Pictures are the same if at most `MAX_BITS` bits of their perceptual hashes differ, and no place in their
    thumbnails by more than `MAX_LEVELS`: the hash alone sees no colours, and takes one simple drawing for another.

    Args:
        num_threads: that decode pictures; default: one per processor.
    """
    overlap = Overlap()
    asked: dict[str, list[Question]] = defaultdict(list)  # question -> evaluation rows
    showing: dict[str, list[Question]] = defaultdict(list)  # picture -> evaluation rows
    num_rows = 0
    for row in evaluation.rows:
        num_rows += 1
        asked[normalise_question(row.question)].append(row)
        for picture in row.pictures:
            showing[picture].append(row)
    asked.pop("", None)
    overlap.compared = {"evaluation_rows": num_rows, "evaluation_pictures": len(showing)}

    met: dict[str, str] = {}  # question -> the first training row that asks it
    pictures: dict[str, None] = {}
    trained: dict[tuple[str, str], str] = {}  # picture and question -> training row
    num_rows = 0
    for row in training.rows:
        num_rows += 1
        pictures |= dict.fromkeys(row.pictures)
        question = normalise_question(row.question)
        if question in asked:
            met.setdefault(question, row.id)
            for picture in row.pictures:
                trained.setdefault((picture, question), row.id)
    overlap.compared |= {"training_rows": num_rows, "training_pictures": len(pictures)}
    overlap.questions = [(id, row.id) for question, id in met.items() for row in asked[question]]

    ours = [*_fingerprints(evaluation, showing, overlap, num_threads)]
    if ours:
        names, bits, thumbnails = ([*column] for column in zip(*ours, strict=True))
        bits, thumbnails = np.stack(bits), np.stack(thumbnails)
        for batch in _batches(_fingerprints(training, pictures, overlap, num_threads)):
            for i, j in _same(np.stack([b for _, b, _ in batch]), np.stack([t for *_, t in batch]), bits, thumbnails):
                overlap.pictures.append((batch[i][0], names[j]))
    both: dict[tuple[str, str], None] = {}
    for picture, evaluated in overlap.pictures:
        for row in showing[evaluated]:
            id = trained.get((picture, normalise_question(row.question)))
            both |= {} if id is None else {(id, row.id): None}
    overlap.rows = [*both]
    return overlap


def mixture_questions(
    mixture: str | Path | Sequence[MixtureEntry], cache_dir: str | Path | None = None, pictures: bool = True
) -> Questions:
    """
    The records of a training YAML, or of what else `read_mixture` reads; ids are `dataset/id`, or `group/dataset/id`
    where two groups have a dataset of the same name.

    Args:
        pictures: False leaves them out, for a comparison of questions alone.

    Raises:
        ValueError: as `read_mixture`, and when the rows are read, for files that cannot be.
    """
    entries = entries_of(mixture, cache_dir)
    counts = Counter(entry.name for entry in entries)
    named = {entry.name if counts[entry.name] == 1 else f"{entry.task_group}/{entry.name}": entry for entry in entries}
    stores = {name: ImageStore(entry.images_path, cache_dir) for name, entry in named.items() if pictures}

    def rows() -> Iterator[Question]:
        for name, entry in named.items():
            for record in stream_records(entry.mimicit_path):
                ids = record["image_ids"] if pictures and entry.task_group != TEXT_ONLY else []
                yield Question(f"{name}/{record['id']}", record["instruction"] or "", [f"{name}/{id}" for id in ids])

    def look(name: str) -> Fingerprint | None:
        # the longest name first: "A/B/1" is of "A/B" where there is one, or else a picture "B/1" of "A"
        for dataset in sorted((one for one in stores if name.startswith(f"{one}/")), key=len, reverse=True):
            try:
                medium = stores[dataset].medium(name.removeprefix(f"{dataset}/"))
                is_picture = not isinstance(medium, Path) and not is_film(medium)
                return fingerprint(stores[dataset].decode(medium)) if is_picture else None
            except KeyError:
                continue
            except OSError:
                return None
        return None

    return Questions(rows(), look)


# what LLaVA-1.5, and who trains or evaluates as it did, puts behind a question
_FORM_OF_ANSWER = (
    " answer the question using a single word or phrase",
    " answer with the option s letter from the given choices directly",
)


def normalise_question(text: str) -> str:
    """Lower case, composed letters, words alone with a space between them, without what asks for a short answer."""
    for token in RESERVED_TOKENS:
        text = text.replace(token, " ")
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(re.findall(r"\w+", text))
    for form in _FORM_OF_ANSWER:
        text = text.removesuffix(form)
    return text


def perceptual_hash(picture: Image.Image) -> np.ndarray:
    """
    `(64,)` bool: which of the lowest frequencies of the picture in grey are above their median (pHash, Zauner 2010),
    as `imagehash.phash` has them.
    """
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    frequencies = _cosines() @ grey @ _cosines().T  # (8, 8)
    frequencies = frequencies.round(6)  # what is flat has no frequencies, but its errors of rounding
    return (frequencies > np.median(frequencies)).flatten()


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The eight lowest rows of a discrete cosine transform (type 2) of 32 values."""
    return 2 * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)


def fingerprint(picture: Image.Image) -> Fingerprint:
    """What pictures are compared by: [`perceptual_hash`], and 8x8 pixels in colour, `(192,)` int16."""
    picture = read_image(picture)  # by the rules by which training data are read
    thumbnail = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return perceptual_hash(picture), np.asarray(thumbnail, dtype=np.int16).flatten()


def _fingerprints(
    side: Questions, pictures: Iterable[str], overlap: Overlap, num_threads: int | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name and fingerprint of each picture; those that have none are counted as left out."""
    names = [*pictures]
    with (
        ThreadPoolExecutor(num_threads or os.cpu_count()) as pool,
        logging.tqdm(desc="Comparing pictures", total=len(names), unit=" images") as progress,
    ):
        for batch in _batches(iter(names)):
            for name, found in zip(batch, pool.map(side.fingerprint, batch), strict=True):
                if found is None:
                    overlap.left_out += 1
                else:
                    yield name, *found
            progress.update(len(batch))


def _same(bits: np.ndarray, thumbnails: np.ndarray, other_bits: np.ndarray, other_thumbnails: np.ndarray):
    """`(i, j)` of the same pictures among `(N, 64)`, `(N, 192)` and `(M, 64)`, `(M, 192)`."""
    signs, other_signs = (np.where(side, 1, -1).astype(np.float32) for side in (bits, other_bits))
    different = (64 - signs @ other_signs.T) / 2  # (N, M)
    for i, j in np.argwhere(different <= MAX_BITS):
        if np.abs(thumbnails[i] - other_thumbnails[j]).max() <= MAX_LEVELS:
            yield int(i), int(j)


def _batches(items: Iterator) -> Iterator[list]:
    while batch := [*islice(items, _BATCH)]:
        yield batch
