"""What a training leaves to look at: the page without any tracker, and TensorBoard's files."""

import json
import re
import xml.dom.minidom
from html.parser import HTMLParser

import pytest
from PIL import Image
from training_files import command, write_training_files

from otter_hf.training.report import _ticks, curves_svg, final_values, sample_evenly, write_report
from otter_hf.training.run import main


HISTORY = [
    {"loss": 2.5, "loss/IMAGE_TEXT": 2.0, "loss/TEXT_ONLY": 3.0, "learning_rate": 1e-3, "step": 1, "epoch": 0.5},
    {"eval_loss": 2.25, "eval_runtime": 3.0, "step": 1, "epoch": 0.5},
    {"step": 1, "epoch": 0.5, "sample_answers": ["a <b>dog</b>"]},
    {"loss": 1.5, "loss/IMAGE_TEXT": 1.5, "learning_rate": 1e-4, "step": 2, "epoch": 1.0},
    {"train_runtime": 9.0, "train_loss": 2.0, "total_flos": 1.0, "step": 2, "epoch": 1.0},
]
SAMPLE = {
    "id": "s",
    "turns": [("hm?", "no"), ("what & where?", "a cat")],
    "media_per_turn": [1, 0],
    "media": [[Image.new("RGB", (400, 300), "red")]],
}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href")]


def test_curves():
    image = curves_svg(HISTORY)
    drawn = xml.dom.minidom.parseString(image)
    titles = [t.firstChild.data for t in drawn.getElementsByTagName("text") if t.getAttribute("font-weight")]
    assert titles == ["loss (per answer token)", "learning_rate"]
    labels = [t.firstChild.data for t in drawn.getElementsByTagName("text") if t.getAttribute("fill")]
    assert labels == ["loss", "loss/IMAGE_TEXT", "loss/TEXT_ONLY", "eval_loss"]
    lines = [line.getAttribute("points") for line in drawn.getElementsByTagName("polyline")]
    assert [len(line.split()) for line in lines] == [2, 2, 1, 1, 2]
    # a pointer over a point is told what it is
    told = [t.firstChild.data for t in drawn.getElementsByTagName("title")]
    assert "loss, step 2: 1.5" in told and "eval_loss, step 1: 2.25" in told
    axes = [t.firstChild.data for t in drawn.getElementsByTagName("text")]
    assert axes.count("step") == 2 and {"1.5", "2", "2.5", "3"} <= {*axes}
    # higher values are higher up
    (_, high), (_, low) = (map(float, point.split(",")) for point in lines[0].split())
    assert high < low
    assert xml.dom.minidom.parseString(curves_svg([])).documentElement.tagName == "svg"
    assert final_values(HISTORY)["loss"] == (1.5, 2) and final_values(HISTORY)["eval_loss"] == (2.25, 1)


def test_page_is_self_contained(tmp_path):
    settings = {"learning_rate": 1e-3, "freeze": ["<vision>"]}
    write_report(tmp_path / "report.html", HISTORY, "Training <of> it", [SAMPLE], settings, "4 steps\n& memory")
    page = (tmp_path / "report.html").read_text()
    assert "<td>learning_rate</td><td>0.001</td>" in page and "&lt;vision&gt;" in page
    assert "<pre>4 steps\n&amp; memory</pre>" in page
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page and "what &amp; where?" in page and "expected: a cat" in page
    assert "Training &lt;of&gt; it" in page
    links = Links()
    links.feed(page)
    assert len(links.found) == 1 and links.found[0].startswith("data:image/jpeg;base64,")
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_long_curve_stays_light_and_ticks_are_round():
    history = [{"loss": 5.0 / step, "step": step} for step in range(1, 3001)]
    assert 200 <= curves_svg(history).count("<title>") <= 201
    for low, high in ((0, 1), (1, 9), (0.013, 0.0171), (1e-6, 5e-5), (-3, 4), (1000, 250_000)):
        ticks = _ticks(low, high)
        assert 3 <= len(ticks) <= 7
        assert low - 1e-9 <= ticks[0] < ticks[-1] <= high * (1 + 1e-9)
    assert _ticks(7, 7) == [7]


def test_samples_are_from_all_over():
    assert sample_evenly(list(range(10)), 3) == [0, 3, 6]
    assert sample_evenly([1], 3) == [1]
    assert sample_evenly(None, 3) == sample_evenly([1], 0) == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("report"))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def test_a_training_writes_page_and_tensorboard(files, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(files / "board"))
    settings = EVALUATED | {"report_to": "tensorboard", "report_samples": 2, "eval_mixture": str(files / "eval.yaml")}
    settings["report_controls"] = True
    main(command(files, "out", **settings))

    page = (files / "out" / "training_report.html").read_text()
    assert "<td>max_steps</td><td>4</td>" in page and "4 steps of 4 samples" in page
    farewell = caplog.messages[-1]
    assert f"saved: model and processor in {files / 'out'}" in farewell
    assert f"report: {files / 'out' / 'training_report.html'}" in farewell
    assert f"next: otter-hf chat {files / 'out'} --image PICTURE" in farewell
    assert page.count("<section>") == 2 and page.count("expected:") == 2
    history = json.loads((files / "out" / "trainer_state.json").read_text())["log_history"]
    answers = [entry for entry in history if "sample_answers" in entry]
    assert [entry["step"] for entry in answers] == [2, 4]
    assert all(len(entry["sample_answers"]) == 2 for entry in answers)
    assert f"<td>4</td><td>{answers[-1]['sample_answers'][0][:1]}" in page.replace("&lt;", "<")

    assert page.count("<th>swapped picture</th><th>blank picture</th>") == 2
    assert all(
        [len(of_control) for of_control in entry["sample_answers_with_controls"].values()] == [2, 2]
        for entry in answers
    )
    gains = [entry for entry in history if "eval_visual_gain" in entry]
    assert [entry["step"] for entry in gains] == [2, 4]
    assert all(e["eval_visual_gain_low"] <= e["eval_visual_gain"] <= e["eval_visual_gain_high"] for e in gains)

    board = EventAccumulator(str(files / "board"))
    board.Reload()
    values = {"train/loss", "train/learning_rate", "eval/loss", "eval/answer_accuracy", "eval/visual_gain"}
    assert values <= {*board.Tags()["scalars"]}
    logged = [event.value for event in board.Scalars("train/loss")]
    assert logged == pytest.approx([entry["loss"] for entry in history if "loss" in entry], rel=1e-6)


def test_answers_survive_a_resume_and_change_nothing(files, monkeypatch):
    """The page of a resumed training has the answers from before, and asking leaves the training as it is."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")
    settings = EVALUATED | {"eval_mixture": str(files / "eval.yaml")}

    def history(name: str, **more):
        main(command(files, name, **settings | more))
        return json.loads((files / name / "trainer_state.json").read_text())["log_history"]

    asked = history("asked")
    silent = history("silent", report_samples=0)
    assert [e["loss"] for e in asked if "loss" in e] == [e["loss"] for e in silent if "loss" in e]
    resumed = history("asked", resume_from_checkpoint=str(files / "asked" / "checkpoint-2"))
    steps = [entry["step"] for entry in resumed if "sample_answers" in entry]
    assert steps == [2, 4]


def test_ticks_that_lie_close_are_told_apart():
    """A memory peak that hardly moves had the same number at each line."""
    svg = curves_svg([{"step": step, "peak_memory_gb": 0.49791 + 0.00001 * step} for step in range(4)])
    labels = re.findall(r'text-anchor="end">(0\.49[^<]*)<', svg)
    assert len(labels) >= 3 and len({*labels}) == len(labels)
