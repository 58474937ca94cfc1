"""
The benchmarks' own files, as their authors publish them, in the columns that our tasks read.

| benchmark | file | pictures, looked for below `image_dir`, or else below the folder of the file |
|---|---|---|
| MME | the folder, in it one of each category with `NAME.txt`, lines of question, tab, answer | `NAME.jpg` or `.png` |
| POPE | `coco_pope_random.json` (JSON lines of text, label, image), or the folder of several | by name |
| MMBench | `.tsv` or `.csv` | base64 in the row, or in the row whose index stands there |
| MathVista | `testmini.json`, {pid: row} | `images/PID.jpg` |
| ScienceQA | `problems.json`, {id: row} | `SPLIT/ID/image.png` |
| SEED-Bench | `SEED-Bench.json` | by `data_id`; films are left out |
| MM-Vet | `mm-vet.json`, {id: row} | by `imagename` |
| VQAv2, OK-VQA, VizWiz, TextVQA | questions and annotations of the VQA challenge; TextVQA's `{"data": [..]}` | by id |
| VizWiz | `val.json`, a list of image, question, answers | by name |
| COCO, Flickr30k | Karpathy's `dataset_coco.json`, or COCO's captions (images, annotations) | by name |
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import replacing
from ..pictures import decode_base64
from ..reading import leads_out
from .scoring.mme import COGNITION, PERCEPTION, category_name


logger = logging.get_logger(__name__)


class Pictures:
    """
    Finds pictures by name.

    Args:
        image_dir: the folder they are in; by default that of the data, and those in it.
        data: the data file.
    """

    def __init__(self, image_dir: str | Path | None, data: Path):
        self._given = image_dir
        if image_dir is not None:
            self._folders = [Path(image_dir).expanduser()]
        else:
            self._folders = [data.parent, *sorted(path for path in data.parent.iterdir() if path.is_dir())]

    def find(self, names: Iterable[str], row: Any) -> str:
        """
        The path of the first of `names` that is there.

        Raises:
            ValueError: if none is, or all lead out of the folder.
        """
        given = list(dict.fromkeys(names))
        names = [name for name in given if not leads_out(name)]
        if not names:
            raise ValueError(f"The picture of row {row!r}, {given[0]!r:.80}, leads out of the folder of the pictures.")
        for folder in self._folders:
            for name in names:
                if (folder / name).is_file():
                    return str((folder / name).resolve())
        places = ", ".join(map(str, self._folders[:3]))
        raise ValueError(
            f"The picture of row {row!r}, {' or '.join(names[:3])}, is not in {places}; say where with `image_dir`."
        )


def read_published(
    benchmark: str, path: str | Path, split: str, image_dir: str | Path | None = None
) -> list[dict] | None:
    """
    The rows of a benchmark's own file in our columns; None for what is not in such a form, to be read as a table.

    Args:
        benchmark: mme, pope, mmbench, mathvista, scienceqa, seedbench, seedbench_official or mmvet.
        path: the file, for POPE also the folder of several, for MME the folder.
        split: which rows of ScienceQA.
        image_dir: folder of the pictures, by default that of the file.

    Raises:
        ValueError: for pictures that are not there, and for rows without a column that the form has.
    """
    path = Path(path).expanduser()
    if not path.exists():
        return None
    if path.is_dir():
        if benchmark == "mme":
            # as it is unpacked it lies in one more
            folders = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
            return next(filter(None, (list(_mme(folder)) for folder in folders)), None)
        files = sorted(path.glob("*_pope_*.json")) if benchmark == "pope" else []
        rows = [row for file in files for row in read_published(benchmark, file, split, image_dir) or []]
        return rows or None
    if (reader := _READERS.get(benchmark)) is None:
        return None
    try:
        return reader(path, split, Pictures(image_dir, path))
    except KeyError as error:
        raise ValueError(f"A row of {path} has no {error}, which the files of {benchmark} have.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not in the form of the files of {benchmark}: {error}.") from error


def _mme(folder: Path) -> Iterator[dict]:
    """The rows of MME's folder; its other folders, such as that of the authors' scoring, are passed over."""
    for category in sorted(path for path in folder.iterdir() if category_name(path.name) in PERCEPTION + COGNITION):
        texts = category / "questions_answers_YN"
        texts, place = (texts, category / "images") if texts.is_dir() else (category, category)
        for path in sorted(texts.glob("*.txt")):
            pictures = [place / f"{path.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".PNG")]
            picture = next(filter(Path.is_file, pictures), None)
            if picture is None:
                names = " or ".join(picture.name for picture in pictures[:2])
                raise ValueError(f"The picture of {path}, {names}, is not in {place}.")
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
                if not line.strip():
                    continue
                question, tab, answer = line.strip().rpartition("\t")
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    raise ValueError(f"Line {number} of {path} is no question, tab and Yes or No: {line!r:.80}.")
                yield {
                    "question_id": f"{category.name}/{picture.name}",
                    "category": category.name,
                    "question": question.strip(),
                    "answer": answer.strip(),
                    "image": str(picture.resolve()),
                }


def _json(path: Path) -> Any:
    if path.suffix not in (".json", ".jsonl"):
        return None
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except ValueError:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):  # U+2028 may stand in a text
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{path} is neither JSON nor JSON lines: line {number}: {error}.") from error
        return rows


def _keyed(path: Path, column: str) -> Mapping[str, dict] | None:
    """A file of the form {id: row}, known by a column of its rows."""
    content = _json(path)
    if not isinstance(content, Mapping) or not content:
        return None
    rows = content.values()
    return content if all(isinstance(row, Mapping) and column in row for row in rows) else None


def _pope(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    rows = _json(path)
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not rows or not all(isinstance(row, Mapping) and "text" in row and "label" in row for row in rows):
        return None
    category = path.stem.rpartition("_")[2]  # coco_pope_random
    return [
        {
            "question_id": f"{category}-{row.get('question_id', number)}",
            "question": row["text"],
            "answer": row["label"],
            "category": category,
            "image": pictures.find([row["image"]], row.get("question_id", number)),
        }
        for number, row in enumerate(rows)
    ]


def _mmbench(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    if path.suffix not in (".tsv", ".csv"):
        return None
    import pandas as pd

    # pandas reads cells of any length; "None" and "NA" are texts of options
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table: {str(error).strip()}.") from error
    if not {"index", "question", "image"} <= set(table.columns):
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}; MMBench has index, question, A, .., image."
        )
    rows = [{name: value if value != "" else None for name, value in row.items()} for row in table.to_dict("records")]
    cells = {row["index"]: row["image"] for row in rows}
    decoded: dict[str, bytes] = {}
    for row in rows:
        cell, seen = row["image"], set()
        while cell is not None and len(cell) < 16 and cell in cells and cell not in seen:
            seen.add(cell)
            cell = cells[cell]
        if cell is None or len(cell) < 16:
            raise ValueError(f"Row {row['index']} of {path} has no picture: its image is {row['image']!r}.")
        try:
            # equal pictures are one object
            row["image"] = decoded[cell] = decoded.get(cell) or decode_base64(cell)
        except ValueError as error:
            raise ValueError(f"The picture of row {row['index']} of {path} is no base64: {error}.") from error
        if not str(row["index"]).isdecimal():
            raise ValueError(f"{path} has the index {row['index']!r}, which is no whole number.")
        row["index"] = int(row["index"])
    return rows


def _mathvista(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    content = _keyed(path, "question_type")
    if content is None:
        return None
    columns = ("question", "choices", "unit", "precision", "answer", "question_type", "answer_type", "query")
    return [
        {
            "pid": str(row.get("pid", pid)),
            **{name: row.get(name) for name in columns},
            "image": pictures.find([row["image"], Path(row["image"]).name], pid),
            "metadata": repr(row.get("metadata") or {}),
        }
        for pid, row in content.items()
    ]


def _scienceqa(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    content = _keyed(path, "choices")
    if content is None:
        return None
    chosen = {id: row for id, row in content.items() if row.get("split", split) == split}
    if not chosen:
        splits = sorted({str(row.get("split")) for row in content.values()})
        raise ValueError(f"{path} has no rows of the split {split!r}; it has {', '.join(splits)}.")
    columns = ("question", "choices", "answer", "hint", "subject", "topic", "category", "grade")
    rows = []
    for id, row in chosen.items():
        image = None
        if row.get("image"):
            folders = (f"images/{row.get('split')}/{id}/", f"{row.get('split')}/{id}/", f"images/{id}/", f"{id}/")
            image = pictures.find([folder + row["image"] for folder in folders], id)
        rows.append({"id": id, **{name: row.get(name) for name in columns}, "image": image})
    return rows


def _seedbench(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    content = _json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("questions"), list):
        return None
    rows = [row for row in content["questions"] if row.get("data_type", "image") == "image"]
    if len(rows) < len(content["questions"]):
        logger.warning(f"{path}: {len(content['questions']) - len(rows)} questions on films are left out.")
    columns = ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "question_type_id")
    return [
        {
            "question_id": str(row["question_id"]),
            **{name: row[name] for name in columns},
            "image": pictures.find([row["data_id"], f"{row['data_id']}.jpg"], row["question_id"]),
        }
        for row in rows
    ]


def _mmvet(path: Path, split: str, pictures: Pictures) -> list[dict] | None:
    content = _keyed(path, "imagename")
    if content is None:
        return None
    return [
        {
            "id": id,
            "question": row["question"],
            "answer": row["answer"],
            "capability": list(row["capability"]),
            "image": pictures.find([row["imagename"]], id),
        }
        for id, row in content.items()
    ]


_READERS: dict[str, Callable] = {
    "pope": _pope,
    "mmbench": _mmbench,
    "mathvista": _mathvista,
    "scienceqa": _scienceqa,
    "seedbench": _seedbench,
    "seedbench_official": _seedbench,
    "mmvet": _mmvet,
}


def read_published_fewshot(
    source: str | Mapping, split: str, image_dir: str | Path | None = None
) -> list[dict] | None:
    """
    The rows of a few-shot data set's own files under our names; None for what is not in such a form.

    Args:
        source: a file, or `{"questions": file, "annotations": file}` of the VQA challenge.
        split: train or test: of Karpathy's file, train takes `restval` in, as is done with his split.
        image_dir: folder of the pictures, by default that of the file.

    Raises:
        ValueError: for files of the challenge without their other half, questions without annotations, rows without a
            key that the form has, a split without rows, and pictures that are not there.
    """
    if isinstance(source, Mapping):
        if set(source) != {"questions", "annotations"}:
            raise ValueError(f"A data set of two files needs `questions` and `annotations`; got {', '.join(source)}.")
        paths = {name: Path(value).expanduser() for name, value in source.items()}
        return list(_vqa_challenge(paths, Pictures(image_dir, paths["questions"])))
    path = Path(source).expanduser()
    content = _json(path) if path.is_file() else None
    if isinstance(content, list) and content and all(map(_is_vizwiz, content)):
        read = _textvqa
        content = [{"question_id": row["image"], "image_id": row["image"], **row} for row in content]
    elif not isinstance(content, Mapping):
        return None
    elif isinstance(content.get("images"), list):
        read = _captions if "annotations" in content else partial(_karpathy, split=split)
    elif isinstance(content.get("data"), list):
        read, content = _textvqa, content["data"]
    elif "questions" in content or "annotations" in content:
        raise ValueError(
            f"{path} is one half of the VQA challenge's files: give `{{questions: FILE, annotations: FILE}}`."
        )
    else:
        return None
    try:
        rows = list(read(content, pictures=Pictures(image_dir, path)))
    except KeyError as error:
        raise ValueError(f"A row of {path} has no {error}.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} has a row of another form than its first ones: {error}.") from error
    if not rows:
        raise ValueError(f"{path} has no rows of the split {split!r}.")
    return rows


def _is_vizwiz(row: Any) -> bool:
    return isinstance(row, Mapping) and "question" in row and str(row.get("image")).startswith("VizWiz_")


def _vqa_challenge(paths: Mapping[str, Path], pictures: Pictures) -> Iterator[dict]:
    questions, annotations = (_json(paths[name]) for name in ("questions", "annotations"))
    subset = questions.get("data_subtype", "") if isinstance(questions, Mapping) else ""
    try:
        annotated = {str(row["question_id"]): row for row in annotations["annotations"]}
        for row in questions["questions"]:
            id, image = row["question_id"], row["image_id"]
            if str(id) not in annotated:
                raise ValueError(f"Question {id} of {paths['questions']} has no answers in {paths['annotations']}.")
            names = _names_of(row.get("image", image), subset)
            yield {
                "question_id": id,
                "image": pictures.find(names, id),
                "question": row["question"],
                "answers": [_answer(answer) for answer in annotated[str(id)]["answers"]],
                "answer_type": annotated[str(id)].get("answer_type"),
            }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{paths['questions']} and {paths['annotations']} are no VQA challenge files: {error!r}."
        ) from error


def _answer(answer: Any) -> str:
    return str(answer["answer"]) if isinstance(answer, Mapping) else str(answer)


def _names_of(image: Any, subset: str) -> list[str]:
    """Names a picture may have that is known by `image`, in VQA's subset, e.g. val2014."""
    if "." in str(image):
        return [str(image)]
    numbered = f"{int(image):012d}" if str(image).isdigit() else str(image)
    coco = f"COCO_{subset}_{numbered}.jpg"
    vizwiz = f"VizWiz_{subset}_{int(image):08d}.jpg" if str(image).isdigit() else coco
    return [coco, f"{subset}/{coco}", f"{numbered}.jpg", f"{image}.jpg", vizwiz, f"{image}.png"]


def _textvqa(rows: list[dict], pictures: Pictures) -> Iterator[dict]:
    for row in rows:
        yield {
            "question_id": row["question_id"],
            "image": pictures.find(_names_of(row["image_id"], ""), row["question_id"]),
            "question": row["question"],
            "answers": [_answer(answer) for answer in row["answers"]],
            "answer_type": row.get("answer_type"),
        }


def _karpathy(content: Mapping, pictures: Pictures, split: str) -> Iterator[dict]:
    wanted = ("train", "restval") if split == "train" else (split,)
    for row in content["images"]:
        if row["split"] in wanted:
            id = row.get("cocoid", row.get("imgid"))
            yield {
                "image_id": id,
                "image": pictures.find(
                    [f"{row.get('filepath', '')}/{row['filename']}".lstrip("/"), row["filename"]], id
                ),
                "captions": [sentence["raw"] for sentence in row["sentences"]],
            }


def _captions(content: Mapping, pictures: Pictures) -> Iterator[dict]:
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for row in content["images"]:
        if row["id"] in captions:
            image = pictures.find([row["file_name"]], row["id"])
            yield {"image_id": row["id"], "image": image, "captions": captions[row["id"]]}


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows as parquet, at once or not at all; pictures are paths or bytes, of which equal ones lie there once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def cell(picture) -> dict | None:
        if picture is None:
            return None
        return {"bytes": picture, "path": None} if isinstance(picture, bytes) else {"bytes": None, "path": picture}

    table = pa.Table.from_pylist([{**row, "image": cell(row["image"])} for row in rows])
    with replacing(path) as written:
        pq.write_table(table, written, dictionary_pagesize_limit=1 << 30)
