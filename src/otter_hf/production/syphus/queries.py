"""The eleven kinds of annotations, and the query that each piece of them becomes."""

import json
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.json_stream import iter_json_object
from ...data.sources.rows import read_rows


logger = logging.get_logger(__name__)

_LARGEST_SCENE = 50


@dataclass(frozen=True)
class Query:
    """One question to the language model, and the pictures that its answers are about.

    Args:
        id: unique in a run.
        text: the annotation in words.
        pictures: names of the pictures, as convert-it names them, without `<X>_IMG_`; None: all whose names begin
            with `prefix`.
        prefix: what the names of the pictures begin with; default: `id`.
        seconds: with `prefix`, the first and the last second of the video.
        instruction: what the answers answer, where the model writes answers only.
    """

    id: str
    text: str
    pictures: tuple[str, ...] | None = None
    prefix: str | None = None
    seconds: tuple[int, int] | None = None
    instruction: str | None = None


Reader = Callable[[Path], Iterator[Query]]


class AnnotationError(ValueError):
    """An annotation is not what it should be; the message names the file and the record."""


def _read(rows: Iterator[tuple[str, Any]], path: Path, build: Callable[[str, Any], Any]) -> Iterator[Any]:
    for id, row in rows:
        try:
            yield build(id, row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
            raise AnnotationError(f"Record {id!r} of {path} {what}.") from None


def _numbered(path: Path) -> Iterator[tuple[str, Any]]:
    return ((str(number), row) for number, row in enumerate(read_rows(path)))


def read_spot_the_difference(path: Path) -> Iterator[Query]:
    """Spot-the-Diff, https://huggingface.co/papers/1808.10584: a list of `{"img_id", "sentences": [text]}`.

    545 of the published ids come twice, with the sentences of another person: they are one query with all of them.
    Pairs without any sentence (47 of the published ones) are left out, and a warning counts them.
    """
    sentences: dict[str, list[str]] = {}

    def collect(_: str, row: dict) -> None:
        own = sentences.setdefault(str(row["img_id"]), [])
        own.extend(text for text in _texts(row["sentences"]) if text.strip() and text not in own)

    for _ in _read(_numbered(path), path, collect):
        pass
    empty = sum(not texts for texts in sentences.values())
    if empty:
        logger.warning(f"{empty} pairs of {path} have no sentence: left out.")
    for id, texts in sentences.items():
        if texts:
            yield Query(id, "\n".join(texts), prefix=id.zfill(5))


def read_coco_spot_the_difference(path: Path) -> Iterator[Query]:
    """Pairs of COCO pictures: `{id: {"sentences": text}}`, ids `<picture>_<picture>`, or with `"pictures": [a, b]`."""

    def build(id: str, row: dict) -> Query:
        return Query(id, _text(row["sentences"]), pictures=tuple(row.get("pictures") or id.split("_")))

    return _read(iter_json_object(path), path, build)


def read_dense_captions(path: Path) -> Iterator[Query]:
    """ActivityNet Captions, https://huggingface.co/papers/1705.00754: `{video: {"timestamps", "sentences"}}`."""

    def build(id: str, row: dict) -> Query:
        times = [[round(start), round(end)] for start, end in row["timestamps"]]
        sentences = json.dumps(_texts(row["sentences"]), ensure_ascii=False)
        return Query(id, f"timestamps: {times}\nsentences: {sentences}")

    return _read(iter_json_object(path), path, build)


def read_tv_captions(path: Path) -> Iterator[Query]:
    """TVC, https://huggingface.co/papers/2001.09099: lines `{"vid_name", "descs": [{"desc"}]}`, joined by video."""
    videos: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(path)):
        try:
            videos.setdefault(row["vid_name"], []).extend(_text(item["desc"]) for item in row["descs"])
        except (KeyError, TypeError) as error:
            raise AnnotationError(f"Line {number + 1} of {path} has no {error}.") from None
    for id, descriptions in videos.items():
        text = "\n".join(f"{number}. {desc}" for number, desc in enumerate(descriptions, start=1))
        # clips of The Big Bang Theory have no show in their names; convert-it adds it
        yield Query(id, text, prefix=f"bbt_{id}" if re.match(r"s\d+e\d+", id) else None)


def read_visual_storytelling(path: Path) -> Iterator[Query]:
    """VIST, https://huggingface.co/papers/1604.03968: `{"images", "annotations", "albums"}`, a query per album."""
    content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    try:
        told: dict[str, list[str]] = {}
        for parts in content["annotations"]:
            for part in parts:
                told.setdefault(str(part["photo_flickr_id"]), []).append(_text(part["text"]))
        images: dict[str, list[dict]] = {}
        for image in content["images"]:
            images.setdefault(str(image["album_id"]), []).append(image)
        albums = [(str(album["id"]), album) for album in content["albums"]]
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{path} is no VIST file: {type(error).__name__} {error}.") from None

    def build(id: str, album: dict) -> Query:
        text = f"title: {album.get('title') or ''}\ndescription: {album.get('description') or ''}\n"
        for image in images[id]:
            annotations = json.dumps(told.get(str(image["id"]), []), ensure_ascii=False)
            tags = image.get("tags") or ""
            text += f"\nimage: {image.get('title') or ''}\ntags: {tags}\nannotations: {annotations}\n"
        return Query(id, text, pictures=tuple(str(image["id"]) for image in images[id]))

    return _read(((id, album) for id, album in albums if id in images), path, build)


def read_scene_navigation(path: Path) -> Iterator[Query]:
    """Descriptions of ScanNet scenes, of which at most 50 are drawn for each.

    `{scene: {"description": [[_, text]]}}` of 2023, or ScanRefer (https://huggingface.co/papers/1912.08830) as it is
    published: a list of `{"scene_id", "description", ...}`. Other scans of a room, `scene0000_01`, are scenes of their
    own; convert-it has pictures of the first.
    """

    def build(id: str, row: dict) -> Query:
        texts = [_text(item[1]) for item in row["description"]]
        chosen = random.Random(id).sample(texts, min(_LARGEST_SCENE, len(texts)))
        return Query(id, "\n".join(chosen))

    with open(path, encoding="utf-8-sig") as file:
        is_published = file.read(64).lstrip().startswith("[")
    if not is_published:
        return _read(iter_json_object(path), path, build)
    scenes: dict[str, dict] = {}

    def collect(_: str, row: dict) -> None:
        scene = scenes.setdefault(str(row["scene_id"]), {"description": []})
        scene["description"].append([row.get("object_id"), _text(row["description"])])

    for _ in _read(_numbered(path), path, collect):
        pass
    return _read(iter(scenes.items()), path, build)


def read_ego4d(path: Path) -> Iterator[Query]:
    """Ego4D narrations: `{video: {"clips": [{"narrations": [{"time", "text", "object_description"}]}]}}`, or
    `narration.json` as Ego4D publishes it, whose summaries say where its clips are.

    A query per clip that has narrations; its pictures are the seconds of the video from the first narration to the
    last.
    """
    for video, content in _ego4d_videos(path):
        seen: set[int] = set()

        def build(id: str, clip: dict, video: str = video, seen: set[int] = seen) -> Query:
            lines, times = [], []
            for narration in clip["narrations"]:
                times.append(float(narration["time"]))
                second, text = round(times[-1]), _text(narration["text"])
                if second in seen:
                    lines.append(f"description: {text}")
                    continue
                seen.add(second)
                lines.append(f"timestamp: {second}\ndescription: {text}")
                if narration.get("object_description"):
                    lines[-1] += f"\nobjects: {'; '.join(_texts(narration['object_description']))}"
            span = (math.floor(min(times)), math.ceil(max(times)))
            return Query(id, "\n".join(lines), prefix=video, seconds=span)

        clips = content.get("clips") if isinstance(content, dict) else None
        if not isinstance(clips, list):
            raise AnnotationError(f"Video {video!r} of {path} has no clips.")
        numbered = ((f"{video}_clip{number:06d}", clip) for number, clip in enumerate(clips))
        # many have none
        told = ((id, clip) for id, clip in numbered if not isinstance(clip, dict) or clip.get("narrations"))
        yield from _read(told, path, build)


def _ego4d_videos(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        first = re.search(r'"(videos|clips|narrations)"\s*:', file.read(1 << 16))
    if first is None or first[1] != "videos":
        yield from iter_json_object(path)
        return
    for video, content in iter_json_object(path, "videos"):
        try:
            yield video, {"clips": list(_published_clips(content))}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AnnotationError(
                f"Video {video!r} of {path} is malformed ({type(error).__name__}: {error})."
            ) from None


def _published_clips(content: dict) -> Iterator[dict]:
    """The clips of a video of narration.json: what one of its annotators told within each of his summaries; what
    stands outside of all belongs to the one in front of it."""
    for annotator in ("narration_pass_1", "narration_pass_2"):
        told = content.get(annotator) or {}
        narrations = [
            {"time": float(narration["timestamp_sec"]), "text": _text(narration["narration_text"])}
            for narration in told.get("narrations") or []
            if narration.get("timestamp_sec") is not None
        ]
        narrations.sort(key=lambda narration: narration["time"])
        starts = sorted({float(part["start_sec"]) for part in told.get("summaries") or []})
        clips: list[list[dict]] = [[] for _ in starts or [0]]
        for narration in narrations:
            clips[max(0, bisect_right(starts, narration["time"]) - 1)].append(narration)
        yield from ({"narrations": clip} for clip in clips)


# Instructions of the FunQA annotations (https://huggingface.co/papers/2306.14899); the apostrophe of "video's" is
# missing in some copies. Captions of humorous and of creative videos are asked for in the same words.
_FUNQA_TASKS = {
    "find the videos humorous moment": "H1",
    "description of the videos humorous moment": "H2",
    "why is the whole video humorous": "H3",
    "please provide a caption for the video": "H4",
    "find the videos creative moment": "C1",
    "description of the videos creative moment": "C2",
    "why is the whole video creative": "C3",
    "please score the videos creativity in 0-20": "C5",
    "find the videos magic moment": "M1",
    "description of the videos magic moment": "M2",
    "why is the whole video magic": "M3",
}


def _funqa_rows(path: Path) -> Iterator[tuple[str, str, dict]]:
    for number, row in enumerate(read_rows(path)):
        where = f"Record {number} of {path}"
        for key in ("instruction", "visual_input", "output"):
            if not isinstance(row.get(key), str):
                raise AnnotationError(f"{where} has no {key}.")
        words = re.sub(r"[^a-z0-9\- ]", "", row["instruction"].lower()).strip()
        if words not in _FUNQA_TASKS:
            raise AnnotationError(f"{where} has the instruction {row['instruction']!r}, which is none of FunQA's.")
        yield row["visual_input"].split("/")[-1], _FUNQA_TASKS[words], row


def read_funqa_translation(path: Path) -> Iterator[Query]:
    """FunQA answers to be translated to English and varied; time spans and scores (tasks 1 and 5) are passed over."""
    for name, task, row in _funqa_rows(path):
        if task[-1] not in "15":
            yield Query(f"{name}_{task}", row["output"], prefix=Path(name).stem, instruction=row["instruction"])


def read_funqa_descriptions(path: Path) -> Iterator[Query]:
    """FunQA descriptions (task 2) with their reasons (task 3), a query per video that has both."""
    videos: dict[str, dict[str, str]] = {}
    for name, task, row in _funqa_rows(path):
        videos.setdefault(name, {})[task[-1]] = row["output"]
    complete = {name: texts for name, texts in videos.items() if "2" in texts and "3" in texts}
    if len(complete) < len(videos):
        logger.warning(f"{len(videos) - len(complete)} videos of {path} lack a description or a reason: left out.")
    for name, texts in complete.items():
        text = f"description: {texts['2']}\ncounter-intuitive reason: {texts['3']}"
        yield Query(name, text, prefix=Path(name).stem)


def read_translation(path: Path) -> Iterator[Query]:
    """A MIMIC-IT instructions file whose instructions and answers are to be translated."""

    def build(id: str, row: dict) -> Query:
        return Query(id, f"<a>{_text(row['instruction'])}</a><b>{_text(row['answer'])}</b>")

    return _read(iter_json_object(path, "data"), path, build)


def read_pairs(path: Path) -> Iterator[Query]:
    """Lines `{"id", "question", "pictures"}` of pairs to be verified: each is asked with its pictures and without."""

    def build(_: str, row: dict) -> Query:
        return Query(row["id"], _text(row["question"]), pictures=tuple(_texts(row["pictures"])))

    return _read(_numbered(path), path, build)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {repr(value)[:60]}")
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list of texts, got {repr(values)[:60]}")
    return [_text(value) for value in values]
