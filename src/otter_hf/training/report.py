"""Figures of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_history(log_history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """
    Draws the curves of a `Trainer`'s `state.log_history` into one PNG: loss in training and evaluation and, where it
    was measured, the accuracy of answers.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    accuracy = _curve(log_history, "eval_answer_accuracy")
    figure = Figure(figsize=(10, 4) if accuracy else (6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        curve = _curve(log_history, key)
        if curve:
            axes[0].plot(*zip(*curve, strict=True), label=label, marker="o" if len(curve) < 30 else None, markersize=4)
    axes[0].set(xlabel="step", ylabel="loss per answer token", yscale="log")
    axes[0].legend()
    if accuracy:
        axes[1].plot(*zip(*accuracy, strict=True), marker="o", markersize=4, color="tab:green", label="held out")
        axes[1].set(xlabel="step", ylabel="share of answers right", ylim=(0, 1.02))
        axes[1].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _curve(log_history: Sequence[Mapping[str, float]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]
