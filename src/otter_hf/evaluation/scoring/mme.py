"""MME (arXiv:2306.13394): two yes/no questions per image in 14 categories."""

from collections.abc import Mapping

from . import percent
from .choices import OTHER
from .replies import is_answered, read_reply


PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "ocr",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# the 2023 copy of the data calls the cognition categories by their first word
_SHORT_NAMES = {name.partition("_")[0]: name for name in COGNITION}


def category_name(name: str) -> str:
    """A category under its official name, in lower case: `OCR` is `ocr`, `code` is `code_reasoning`."""
    name = name.lower()
    return _SHORT_NAMES.get(name, name)


def parse_answer(reply: str) -> str:
    """
    `"yes"`, `"no"` or `"other"`, by the official rule: the whole reply, or its first four characters, without thoughts
    and full stops. What is no answer is other.
    """
    if not is_answered(reply):
        return OTHER
    reply = read_reply(reply).lower().strip(" \"'`*_").replace(".", "")
    if reply in ("yes", "no"):
        return reply
    return next((word for word in ("yes", "no") if word in reply[:4]), OTHER)


def score(records: list[Mapping]) -> dict[str, float]:
    """
    Points: a category is worth 100 * accuracy + 100 * accuracy+, the share of images with both questions right.

    Args:
        records: with `category`, `image_id`, `answer` and `prediction`.

    Returns:
        `perception` (at most 2000), `cognition` (at most 800), `category/NAME` (at most 200 each), `unparsed`, the
        replies that are neither yes nor no and count as wrong, and `incomplete_images`, those that do not have exactly
        two questions (a limit cut them off); they are left out.
    """
    images: dict[tuple[str, str], list[bool]] = {}
    for record in records:
        key = (category_name(record["category"]), str(record["image_id"]))
        images.setdefault(key, []).append(record["prediction"] == record["answer"].lower().strip(". "))
    complete = {key: right for key, right in images.items() if len(right) == 2}
    points = {}
    for category in dict.fromkeys(category for category, _ in complete):
        pairs = [right for (name, _), right in complete.items() if name == category]
        accuracy = percent(sum(map(sum, pairs)), 2 * len(pairs))
        points[category] = accuracy + percent(sum(map(all, pairs)), len(pairs))
    return {
        "perception": sum(points.get(category, 0.0) for category in PERCEPTION),
        "cognition": sum(points.get(category, 0.0) for category in COGNITION),
        "unparsed": sum(record["prediction"] == OTHER for record in records),
        "incomplete_images": len(images) - len(complete),
        **{f"category/{category}": value for category, value in sorted(points.items())},
    }
