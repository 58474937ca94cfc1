"""What benchmarks share with the data that a model was trained on; see `otter_hf.data.contamination`."""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..data.contamination import (
    Fingerprint,
    Overlap,
    Question,
    Questions,
    find_overlap,
    fingerprint,
    mixture_questions,
)
from ..data.mixture_yaml import read_mixture
from ..made_from import MadeFrom
from ..pictures import ImageError
from ..storage import is_remote
from .benchmarks import BENCHMARKS, row_id
from .config import DatasetSpec, EvalConfig
from .fewshot.rows import Rows
from .fewshot.run import KINDS
from .run import build_tasks


class _Table(NamedTuple):
    """Rows of a benchmark: `look(number)` gives id, question and pictures of one, None for each film."""

    length: int
    look: Callable[[int], tuple[str, str, list[Image.Image | None]]]


def check_contamination(config: EvalConfig) -> Overlap:
    """
    The rows that a configuration evaluates on against its `training_data`.

    Ids are `dataset/id` of the evaluation and of the training data; pictures of the former `dataset/row/number`.

    Raises:
        ValueError: for data that cannot be read.
    """
    tables = dict(chain.from_iterable(_tables(dataset, config) for dataset in config.datasets))

    seen = {}  # a row is read with its pictures: each is looked at once

    def rows() -> Iterator[Question]:
        for name, table in tables.items():
            for number in range(table.length):
                id, question, pictures = table.look(number)
                places = [f"{name}/{number}/{k}" for k in range(len(pictures))]
                seen.update(zip(places, map(_fingerprint, pictures), strict=True))
                yield Question(f"{name}/{id}", question, places)

    return find_overlap(mixture_questions(config.training_data), Questions(rows(), seen.get))


def _fingerprint(picture: Image.Image | None) -> Fingerprint | None:
    try:
        return None if picture is None else fingerprint(picture)
    except ImageError:
        return None


def inputs_of(config: EvalConfig) -> MadeFrom:
    """What `check_contamination` reads: local files by their state, what is on the Hub by its name."""
    entries = read_mixture(config.training_data)
    paths = [path for entry in entries for path in (entry.mimicit_path, *entry.images_path)]
    asked = []
    for dataset in config.datasets:
        place = {"name": dataset.name, "tasks": list(dataset.tasks), "limit": dataset.limit, "split": dataset.split}
        sources = [dataset.data_path, dataset.image_dir]
        if (settings := dataset.fewshot) is not None:
            test = settings["test"]
            of_rows = ("test", "test_split", "columns", "image_dir")
            place |= {name: settings[name] for name in of_rows if name in settings}
            sources = [*(test.values() if isinstance(test, Mapping) else [test]), settings.get("image_dir")]
        paths += [path for path in sources if path and Path(path).expanduser().exists()]
        asked.append({**place, "sources": list(map(str, sources))})
    training = [[entry.task_group, entry.name] for entry in entries]
    options = {"training_data": training, "datasets": asked, "lmms-eval": version("lmms-eval")}
    return MadeFrom.of([path if is_remote(path) else Path(path).expanduser() for path in paths], **options)


def _tables(dataset: DatasetSpec, config: EvalConfig) -> Iterator[tuple[str, _Table]]:
    """Name and rows of each task of a data set."""
    if dataset.fewshot is not None:
        settings = dataset.fewshot
        options = {"image_dir": settings.get("image_dir"), "columns": settings.get("columns")}
        test = Rows(settings["test"], settings.get("test_split", "test"), KINDS[dataset.name], **options)

        def look_fewshot(number: int) -> tuple[str, str, list[Image.Image | None]]:
            row = test[number]
            return str(row["id"]), str(row.get("question") or row.get("text") or ""), [row["image"]]

        yield dataset.name, _Table(len(test), look_fewshot)
        return
    for name, task in build_tasks(dataset, config.output / "data"):
        ours, docs = name in BENCHMARKS, task.eval_docs

        def look(number: int, task=task, docs=docs, ours=ours) -> tuple[str, str, list[Image.Image | None]]:
            doc = docs[number]
            id, question = row_id(doc) or str(number), doc.get("question") or doc.get("instruction")
            visuals = [one if isinstance(one, Image.Image) else None for one in task.doc_to_visual(doc) or []]
            if ours:
                return id, str(question or ""), visuals
            # a task's own text may have its prompt around the question, which training data have not
            return id, question if isinstance(question, str) else str(task.doc_to_text(doc)), visuals

        length = len(docs) if dataset.limit is None else min(len(docs), dataset.limit)
        yield (dataset.name if ours else name), _Table(length, look)
