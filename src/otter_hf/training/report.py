"""Figures of a training run, for those who use no tracker: `training.png`, `training.svg`, `training_report.html`.

The page holds everything it shows: curves of all values that were logged, and what the model answered to a few samples
of the evaluation data each time it was evaluated.
"""

import html
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainerCallback

from ..data.collator import IGNORE_INDEX
from ..data.controls import control_media, visual_gain
from ..data.samples import Sample, SampleError
from ..files import write_text
from ..pictures import encode_base64, encode_image


logger = logging.getLogger(__name__)

REPORT_FILE = "training_report.html"
# key of `log_history`, which goes into every checkpoint, under which answers are kept
ANSWERS = "sample_answers"
# and by control those to the same questions with other pictures
CONTROL_ANSWERS = "sample_answers_with_controls"
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
# points of a curve that say their value
_HOVERED = 200
_UNITS = {
    "loss": "per answer token",
    "answer_accuracy": "share of answers right",
    "visual_gain": "percent of answers, right picture less another",
    "grad_norm": "before clipping",
    "mfu": "share of the peak",
}
_HIDDEN = ("step", "epoch", "total_flos", "train_", "eval_runtime", "eval_samples_per", "eval_steps_per")


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
    if axes[0].get_lines():  # a training that is stopped at once has logged nothing
        axes[0].legend()
    if accuracy:
        axes[1].plot(*zip(*accuracy, strict=True), marker="o", markersize=4, color="tab:green", label="held out")
        axes[1].set(xlabel="step", ylabel="share of answers right", ylim=(0, 1.02))
        axes[1].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def final_values(log_history: Sequence[Mapping]) -> dict[str, tuple[float, int]]:
    """The last value of everything that was logged in training and evaluation, and its step."""
    return {key: (curve[-1][1], curve[-1][0]) for key, curve in _curves(log_history).items()}


def curves_svg(log_history: Sequence[Mapping]) -> str:
    """All curves of a `log_history` as one SVG image, a panel for each value; training and evaluation share one."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key, curve in _curves(log_history).items():
        panels.setdefault(key.removeprefix("eval_").split("/")[0], {})[key] = curve
    width, height, columns = 330, 200, 3
    drawn = [
        f'<g transform="translate({i % columns * width} {i // columns * height})">{_panel(title, curves)}</g>'
        for i, (title, curves) in enumerate(panels.items())
    ]
    size = f"{columns * width} {max(1, -(-len(drawn) // columns)) * height}"
    style = "font-family:sans-serif;font-size:11px;background:white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" style="{style}">{"".join(drawn)}</svg>\n'


def _panel(title: str, curves: dict[str, list[tuple[int, float]]]) -> str:
    left, top, width, height = 60, 24, 250, 134
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    across, up = width / ((last - first) or 1), height / ((high - low) or 1)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (step - first) * across, top + (high - value) * up

    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>']
    for value, label in _labelled(_ticks(low, high)):
        y = place(first, value)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for step in dict.fromkeys(map(round, _ticks(first, last))):
        x = place(step, low)[0]
        parts.append(f'<path d="M{x:.1f} {top}v{height}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 13}" text-anchor="middle">{step:,}</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 26}" text-anchor="end">step</text>')
    for i, (key, curve) in enumerate(curves.items()):
        points = [place(*point) for point in curve]
        colour = _COLOURS[i % len(_COLOURS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        # what a pointer over it is told, of so many points that the page stays light
        dots = colour if len(curve) < 30 else "transparent"
        for number in dict.fromkeys(range(0, len(curve), -(-len(curve) // _HOVERED))) | {len(curve) - 1: None}:
            (x, y), (step, value) = points[number], curve[number]
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{dots}" stroke="transparent" stroke-width="8">'
                f"<title>{html.escape(key)}, step {step:,}: {value:.5g}</title></circle>"
            )
        if len(curves) > 1:
            at = f'x="{left + width - 6}" y="{top + 14 + 13 * i}" text-anchor="end"'
            parts.append(f'<text {at} fill="{colour}">{html.escape(key)}</text>')
    name = f"{title} ({_UNITS[title]})" if title in _UNITS else title
    parts.append(f'<text x="{left}" y="16" font-weight="bold">{html.escape(name)}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """At least three round values from `low` to `high`, not many more, or the one there is."""
    if high <= low:
        return [low]
    size = 10.0 ** math.floor(math.log10(high - low))
    for factor in (5, 2, 1, 0.5, 0.2):
        gap = size * factor
        first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
        if last - first >= 2:
            break
    return [number * gap for number in range(first, last + 1)]


def _labelled(ticks: list[float]) -> list[tuple[float, str]]:
    """Ticks and what is written beside them: four digits, or as many as tell them apart."""
    for digits in range(4, 17):
        labels = [f"{value:.{digits}g}" for value in ticks]
        if len({*labels}) == len(ticks):
            break
    return list(zip(ticks, labels, strict=True))


def write_report(
    path: str | Path,
    log_history: Sequence[Mapping],
    title: str,
    samples: Sequence[Sample] = (),
    settings: Mapping | None = None,
    plan: str = "",
) -> None:
    """
    Writes the page with curves, sample answers, settings and plan, complete or not at all.

    Args:
        path: the HTML file.
        log_history: a `Trainer`'s, with the answers that `TrainingReport` puts there.
        title: heading.
        samples: those that were asked, in the order of the answers.
        settings: what was asked for, other than the defaults.
        plan: what is trained, with what memory, as the training told it.
    """
    answered = [entry for entry in log_history if ANSWERS in entry]
    blocks = []
    for number, sample in enumerate(samples if answered else ()):
        controls = dict.fromkeys(name for entry in answered for name in entry.get(CONTROL_ANSWERS, {}))
        rows = []
        for entry in answered:
            if number < len(entry[ANSWERS]):
                others = [entry.get(CONTROL_ANSWERS, {}).get(name, {number: ""})[number] for name in controls]
                cells = [f"{entry['step']:,}", entry[ANSWERS][number], *others]
                rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
        question, truth = sample["turns"][-1]
        heads = "".join(f"<th>{name} picture</th>" for name in controls)
        pictures = "".join(_thumbnail(medium[0]) for medium in sample["media"][:4])
        blocks.append(
            f"<section>{pictures}<p><b>{html.escape(question)}</b><br>expected: {html.escape(truth)}</p>"
            f"<table><tr><th>step</th><th>answer</th>{heads}</tr>{''.join(rows)}</table></section>"
        )
    answers = f"<h2>Sample answers</h2>{''.join(blocks)}" if blocks else ""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in (settings or {}).items()
    )
    asked = f"<h2>Settings</h2><table>{rows}</table>" if rows else ""
    planned = f"<h2>Plan</h2><pre>{html.escape(plan)}</pre>" if plan else ""
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font-family: sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }}
.curves {{ overflow-x: auto; }}
.curves svg {{ min-width: 700px; }}
section {{ border-top: 1px solid #ccc; padding: 0.5em 0; overflow: hidden; }}
img {{ float: right; margin-left: 0.5em; }}
pre {{ white-space: pre-wrap; }}
td, th {{ text-align: left; padding: 0.1em 0.8em 0.1em 0; vertical-align: top; }}
</style>
<h1>{html.escape(title)}</h1>
<div class="curves">{curves_svg(log_history)}</div>
{answers}
{asked}
{planned}
</html>
"""
    write_text(path, page)


def _thumbnail(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((160, 120))
    return f'<img src="data:image/jpeg;base64,{encode_base64(encode_image(image, "JPEG"))}" alt="">'


def sample_evenly(dataset: Sequence[Sample] | None, count: int) -> list[Sample]:
    """`count` samples from all over a dataset, always the same."""
    size = 0 if dataset is None else len(dataset)
    count = min(count, size)
    return [dataset[i * size // count] for i in range(count)]


class TrainingReport(TrainerCallback):
    """
    Keeps `training_report.html` in the output folder up to date, and asks the model a few samples at each evaluation.

    The answers stand in `state.log_history`, and so survive a resume.

    Args:
        trainer: the trainer, whose collator makes the prompts.
        samples: samples of the evaluation data; the last turn of each is asked.
        max_new_tokens: of an answer.
        settings, plan: for the page, see `write_report`.
        controls: of [`~otter_hf.data.controls.CONTROLS`], with which the samples are asked, too. What the right
            pictures are worth is logged as `eval_visual_gain`, the share of answers that are exactly right less that
            with the pictures of other samples, in percent, between `eval_visual_gain_low` and `_high` with 95 %.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Sequence[Sample] = (),
        max_new_tokens: int = 32,
        settings: Mapping | None = None,
        plan: str = "",
        controls: Sequence[str] = (),
    ):
        self.trainer = trainer
        self.settings, self.plan, self.controls = settings, plan, controls
        self.samples = [sample for sample in samples if _can_be_asked(trainer, sample)]
        self.max_new_tokens = max_new_tokens

    def on_evaluate(self, args, state, control, **kwargs):
        if self.samples:
            # on all processes: a sharded model can be run by all of them only
            answers = [self._answer(sample) for sample in self.samples]
            entry = {"step": state.global_step, "epoch": state.epoch, ANSWERS: answers}
            others = {name: [*map(self._answer_if_it_fits, self._controlled(name))] for name in self.controls}
            if others:
                entry[CONTROL_ANSWERS] = others
            state.log_history.append(entry)
            if "swapped" in others:
                gain = visual_gain(_percent, self._right(answers), self._right(others["swapped"]))
                low, high = gain["interval"]
                told = {"": gain["visual_gain"], "_low": low, "_high": high}
                self.trainer.log({f"eval_visual_gain{name}": value for name, value in told.items()})
            self._write(state)

    def on_save(self, args, state, control, **kwargs):
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)

    def _write(self, state):
        if state.is_world_process_zero and state.log_history:
            folder = Path(self.trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            title = f"Training of {folder.name}"
            write_report(folder / REPORT_FILE, state.log_history, title, self.samples, self.settings, self.plan)

    def _controlled(self, control: str) -> list[Sample]:
        """The samples with other media."""
        return [
            {
                **sample,
                "media": control_media(
                    control, sample["media"], number, len(self.samples), lambda row: self.samples[row]["media"]
                ),
            }
            for number, sample in enumerate(self.samples)
        ]

    def _right(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer is the expected one, but for case and a full stop."""
        truths = [sample["turns"][-1][1] for sample in self.samples]
        return [_plain(answer) == _plain(truth) for answer, truth in zip(answers, truths, strict=True)]

    def _answer_if_it_fits(self, sample: Sample) -> str:
        """The picture of another sample may be too large beside this one's text; training goes on."""
        try:
            return self._answer(sample)
        except SampleError as error:
            logger.info(f"Not asked with another picture: {error}")
            return ""

    def _answer(self, sample: Sample) -> str:
        """What the model says at the place of the sample's last answer."""
        batch = self.trainer.data_collator([sample])
        supervised = batch["labels"][0] != IGNORE_INDEX  # (L,)
        places = supervised.nonzero().flatten().tolist()
        start = max(place for place in places if place - 1 not in places)
        prompt = batch["input_ids"][:, :start].to(self.trainer.args.device)
        media = {name: tensor.to(prompt.device) for name, tensor in batch.items() if name.startswith("pixel_")}
        if "image_attention_mask" in batch:  # of Idefics
            media["image_attention_mask"] = batch["image_attention_mask"][:, :start].to(prompt.device)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **media,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        model.train(training)
        return self.trainer.processing_class.post_process_image_text_to_text(output[:, start:])[0]


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)


def _can_be_asked(trainer: Trainer, sample: Sample) -> bool:
    try:
        trainer.data_collator([sample])
    except SampleError as error:
        logger.info(f"Not among the sample answers: {error}")
        return False
    return True


def _curves(log_history: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    keys = dict.fromkeys(key for entry in log_history for key in entry if not key.startswith(_HIDDEN))
    curves = {key: _curve(log_history, key) for key in keys}
    return {key: curve for key, curve in curves.items() if curve}


def _curve(log_history: Sequence[Mapping], key: str) -> list[tuple[int, float]]:
    entries = ((entry["step"], entry[key]) for entry in log_history if key in entry)
    return [(step, value) for step, value in entries if isinstance(value, (int, float)) and math.isfinite(value)]
