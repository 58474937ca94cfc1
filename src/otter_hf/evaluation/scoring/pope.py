"""POPE (arXiv:2305.10355): does the model see objects that are not there?"""

import re
from collections.abc import Mapping

from . import percent
from .choices import OTHER
from .replies import is_answered, read_reply


_AROUND = "\"'`“”‘’*_#!?;:()[]{}<>~|$\\/…"


def parse_answer(reply: str) -> str:
    """
    `"no"` if the first sentence has the word "no" or "not", else `"yes"`: the official rule. `"other"` if there is no
    answer to read: the official code takes failed requests, empty replies and refusals for a yes.

    Quotes, markdown, line breaks and other punctuation around a word do not hide it ("No!", "**No**"), nor do
    capitals, which the official code knows in "No" alone.
    """
    if not is_answered(reply):
        return OTHER
    sentences = re.split(r"\.", re.sub("[—–]", " ", read_reply(reply).lower()).replace(",", ""))
    first = next((sentence for sentence in sentences if re.search(r"\w", sentence)), "")
    words = {word.strip(_AROUND) for word in first.split()}
    return "no" if words & {"no", "not"} else "yes"


def score(records: list[Mapping]) -> dict[str, float]:
    """
    The official figures over all rows, and for each setting (random, popular, adversarial).

    Args:
        records: with `category`, `answer` and `prediction`, "yes", "no" or "other", which is wrong either way.

    Returns:
        `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (share of *predicted* yes; the 2023 code gave that of the
        truth, here `gold_yes_ratio`), the same under `SETTING/`, `mean_f1` over the settings, and `unparsed`.
    """
    settings = sorted({record["category"] for record in records})
    by_setting = {name: _figures([r for r in records if r["category"] == name]) for name in settings}
    return {
        **_figures(records),
        "unparsed": sum(record["prediction"] == OTHER for record in records),
        "mean_f1": sum(figures["f1"] for figures in by_setting.values()) / max(1, len(settings)),
        **{f"{name}/{key}": value for name, figures in by_setting.items() for key, value in figures.items()},
    }


def _figures(records: list[Mapping]) -> dict[str, float]:
    pairs = [(record["prediction"], record["answer"].lower().strip()) for record in records]
    true_yes = sum(said == truth == "yes" for said, truth in pairs)
    said_yes, is_yes = sum(said == "yes" for said, _ in pairs), sum(truth == "yes" for _, truth in pairs)
    return {
        "accuracy": percent(sum(said == truth for said, truth in pairs), len(pairs)),
        "precision": percent(true_yes, said_yes),
        "recall": percent(true_yes, is_yes),
        "f1": percent(2 * true_yes, said_yes + is_yes),
        "yes_ratio": percent(said_yes, len(pairs)),
        "gold_yes_ratio": percent(is_yes, len(pairs)),
    }
