"""Classification by the log-probability of class names: ImageNet and Hateful Memes of the Flamingo papers."""

from collections.abc import Mapping, Sequence

import torch

from . import percent


# OpenFlamingo's own code divides by the number of tokens; the 2023 suite, and LAVIS for SEED-Bench, do not
LIKELIHOODS = ("mean", "sum")


def likelihood(total: float, tokens: int, kind: str) -> float:
    """
    What candidates are ranked by: their tokens' log-probabilities, summed up (`sum`) or on average (`mean`).

    Raises:
        ValueError: for another kind.
    """
    if kind not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {kind!r}.")
    return total / tokens if kind == "mean" else total


def probabilities(log_likelihoods: Sequence[float]) -> list[float]:
    """Of candidates with these log-probabilities, the probability of each given that it is one of them."""
    return torch.tensor(log_likelihoods, dtype=torch.float64).softmax(dim=0).tolist()


def roc_auc(scores: Sequence[float], labels: Sequence[int]) -> float | None:
    """
    Area under the ROC curve: how often a positive has the higher score, ties counting half; None with one class only.

    Args:
        scores: e.g. P(yes).
        labels: 1 for positives, 0 for negatives.
    """
    positives = torch.tensor([s for s, label in zip(scores, labels, strict=True) if label], dtype=torch.float64)
    negatives = torch.tensor([s for s, label in zip(scores, labels, strict=True) if not label], dtype=torch.float64)
    if not len(positives) or not len(negatives):
        return None
    negatives = negatives.sort().values
    below = torch.searchsorted(negatives, positives, side="left")
    up_to = torch.searchsorted(negatives, positives, side="right")
    return float((below + up_to).sum()) / (2 * len(positives) * len(negatives))


def score(records: Sequence[Mapping]) -> dict[str, float]:
    """
    Top-1 and top-5 accuracy in percent.

    Args:
        records: with `log_likelihoods`, one per class, and `label`, the number of the right one.
    """
    ranked = [sorted(range(len(r["log_likelihoods"])), key=lambda i: -r["log_likelihoods"][i]) for r in records]
    hits = {k: sum(r["label"] in order[:k] for r, order in zip(records, ranked, strict=True)) for k in (1, 5)}
    return {**{f"top{k}_accuracy": percent(hits[k], len(records)) for k in hits}, "questions": len(records)}


def score_binary(records: Sequence[Mapping]) -> dict[str, float | None]:
    """
    Area under the ROC curve of the second class's probability, in percent, and accuracy.

    Args:
        records: see [`score`], with two classes. The 2023 code took the winner's probability, of which the area says
            nothing.
    """
    positive = [probabilities(record["log_likelihoods"])[1] for record in records]
    auc = roc_auc(positive, [record["label"] for record in records])
    figures = score(records)
    return {
        "roc_auc": None if auc is None else 100.0 * auc,
        "accuracy": figures["top1_accuracy"],
        "questions": len(records),
    }
