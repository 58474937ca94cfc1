"""POPE (arXiv:2305.10355): does the model see objects that are not there?"""

from collections.abc import Mapping

from . import percent


def parse_answer(reply: str) -> str:
    """The official rule: "no" if the first sentence has the word "no" or "not", else "yes"."""
    words = reply.split(".")[0].replace(",", "").lower().split(" ")
    return "no" if "no" in words or "not" in words else "yes"


def score(records: list[Mapping]) -> dict[str, float]:
    """
    The official figures over all rows, and for each setting (random, popular, adversarial).

    Args:
        records: with `category`, `answer` and `prediction`, "yes" or "no".

    Returns:
        `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (share of *predicted* yes; the 2023 code gave that of the
        truth, here `gold_yes_ratio`), the same under `SETTING/`, and `mean_f1` over the settings.
    """
    settings = sorted({record["category"] for record in records})
    by_setting = {name: _figures([r for r in records if r["category"] == name]) for name in settings}
    return {
        **_figures(records),
        "mean_f1": sum(figures["f1"] for figures in by_setting.values()) / max(1, len(settings)),
        **{f"{name}/{key}": value for name, figures in by_setting.items() for key, value in figures.items()},
    }


def _figures(records: list[Mapping]) -> dict[str, float]:
    pairs = [(record["prediction"] == "yes", record["answer"].lower().strip() == "yes") for record in records]
    true_yes = sum(said and is_so for said, is_so in pairs)
    said_yes, is_yes = sum(said for said, _ in pairs), sum(is_so for _, is_so in pairs)
    return {
        "accuracy": percent(sum(said == is_so for said, is_so in pairs), len(pairs)),
        "precision": percent(true_yes, said_yes),
        "recall": percent(true_yes, is_yes),
        "f1": percent(2 * true_yes, said_yes + is_yes),
        "yes_ratio": percent(said_yes, len(pairs)),
        "gold_yes_ratio": percent(is_yes, len(pairs)),
    }
