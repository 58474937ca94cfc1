"""Question sets over pictures, the egocentric assistant, Syphus with several providers; all clients are made."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from otter_hf.films import open_film


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHAPES = EXAMPLES.parent / "src" / "otter_hf" / "demo" / "examples"
SETS = sorted((EXAMPLES / "question_sets").glob("*.yaml"))


def script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Model:
    """Says yes to what a question names, the likelier the redder the picture is."""

    def generate(self, conversations, **kwargs):
        (((message,),),) = (conversations,)
        kind = message["content"][0]["type"]
        return [f"{len(message['content'][0][kind])} frames" if kind == "video" else "a red square"]

    def answers(self, conversations, **kwargs):
        yield {number: "a red square" for number, _ in enumerate(conversations)}

    def log_likelihoods(self, conversations, candidates, **kwargs):
        yield {number: self.log_likelihood(one, candidates[number]) for number, one in enumerate(conversations)}

    def log_likelihood(self, conversation, candidates):
        picture = conversation[0]["content"][0]["image"].convert("RGB").resize((1, 1))
        red = picture.getpixel((0, 0))[0] / 255 if "square" in conversation[0]["content"][1]["text"] else 0.1
        return [(-3 * (1 - red), 1, True), (-3 * red, 1, False)]


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_question_sets(path):
    ask_pictures = script("ask_pictures")
    questions = ask_pictures.read_question_set(path)
    (answer,) = ask_pictures.ask_all(Model(), [Image.new("RGB", (8, 8), "red")], questions)
    if path.stem == "captioning":
        assert answer == {"caption": "a red square"}
    else:
        assert answer["scores"].keys() == questions["questions"].keys() and len(answer["scores"]) > 4
        assert all(question.endswith("?") and "{" not in question for question in questions["questions"].values())


def test_labels_are_compared_with_the_truth():
    ask_pictures = script("ask_pictures")
    questions = {"task": "yes_no", "questions": {"square": "a square?", "dog": "a dog?"}, "threshold": 0.5}
    colors = ("red", "blue")
    found = ask_pictures.ask_all(Model(), [Image.new("RGB", (4, 4), color) for color in colors], questions, 1)
    answers = dict(zip(colors, found, strict=True))
    assert answers["red"]["labels"] == ["square"] and answers["blue"]["labels"] == []
    assert answers["red"]["scores"]["square"] == 0.9526  # 1 / (1 + e^-3)
    figures = ask_pictures.figures(answers, {"red": ["square", "dog"], "blue": ["square"]}, questions)
    assert figures["all"] == {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "there": 3}
    assert figures["dog"] == {"precision": None, "recall": 0.0, "f1": 0.0, "there": 1}
    with pytest.raises(ValueError, match="none of the pictures"):
        ask_pictures.figures(answers, {"other": []}, questions)


@pytest.mark.parametrize("task", ["yes_no", "caption"])
def test_what_the_right_picture_is_worth(task):
    ask_pictures = script("ask_pictures")
    names = {"square": "a square?"} if task == "yes_no" else {"caption": "what?"}
    questions = {"task": task, "questions": names, "threshold": 0.5, "max_new_tokens": 9}
    pictures = {color: Image.new("RGB", (4, 4), color) for color in ("red", "blue")}
    found = ask_pictures.ask_all(Model(), list(pictures.values()), questions)
    answers = dict(zip(pictures, found, strict=True))
    others = ask_pictures.controlled(Model(), pictures, questions)
    truth = {"red": ["square"], "blue": []}
    if task == "caption":  # the same whatever it sees
        pytest.importorskip("pycocoevalcap")
        truth = {"red": ["a red square"], "blue": ["a blue one"]}
    told = ask_pictures.gain(answers, others, truth, questions)
    assert told["swapped"] == (0.0 if task == "yes_no" else ask_pictures.figures(answers, truth, questions)["cider"])
    # one of two has a square: as often as it is drawn, it is found
    assert told["visual_gain"] == (1.0 if task == "yes_no" else 0.0)
    assert told["interval"] == ([0.0, 1.0] if task == "yes_no" else [0.0, 0.0])


@pytest.mark.parametrize(
    "content, message",
    [
        ("task: other", "task must be"),
        ("{task: yes_no, labels: [a]}", "needs questions"),
        ("{task: caption, a: 1}", "keys a;"),
    ],
)
def test_broken_question_sets_are_refused(tmp_path, content, message):
    (tmp_path / "set.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        script("ask_pictures").read_question_set(tmp_path / "set.yaml")


def test_a_real_model_is_asked(tmp_path, model, processor, capsys):
    model.save_pretrained(tmp_path / "otter")
    processor.save_pretrained(tmp_path / "otter")
    arguments = ["--model", str(tmp_path / "otter"), "--images", str(SHAPES), "--output", str(tmp_path / "tags.jsonl")]
    (tmp_path / "truth.json").write_text('{"circle.png": ["plant"]}')
    script("ask_pictures").main([str(SETS[-1]), *arguments, "--truth", str(tmp_path / "truth.json"), "--controls"])
    rows = [json.loads(line) for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["circle.png", "square.png", "triangle.png"]
    assert all(0 <= score <= 1 for row in rows for score in row["scores"].values())
    told = capsys.readouterr().out
    assert '"there": 1' in told and '"visual_gain"' in told


def test_the_window_rolls_and_answers_with_times():
    egocentric = script("egocentric")
    with open_film(SHAPES / "ball.mp4") as film:
        times = [float(frame.time) for frame in film.frames()]
    step = times[-1] / 4
    window = egocentric.RollingWindow(SHAPES / "ball.mp4", step, size=2)
    typed = [
        "what?",
        "/frame",
        "/frame",
        f"/frame {3 * step}",
        "what is it?",
        "/when is it a square?",
        "/frame 0",
        "/x",
    ]
    said = list(egocentric.converse(Model(), window, [*typed, "/quit", "never"]))
    assert len(said) == len(typed)
    assert said[0].startswith("no frame has been seen") and said[1] == "at 0:00, 1 frames"
    assert len(window.frames) == 2 and 2 * step <= window.frames[0][0] < window.time < 4 * step
    span = "-".join(egocentric.clock(time) for time, _ in window.frames)
    assert said[4] == f"{span}  2 frames"
    reddest = max(window.frames, key=lambda pair: pair[1].resize((1, 1)).getpixel((0, 0))[0])
    assert said[5].startswith(egocentric.clock(reddest[0])) and said[5].endswith(")")
    assert "does not go back" in said[6] and "there are /frame" in said[7]
    assert window.play(1e9) and not window.play()


def test_clock():
    clock = script("egocentric").clock
    assert [clock(time) for time in (0, 9.04, 61.5, 600)] == ["0:00", "0:09", "1:01.5", "10:00"]


def test_the_proxy_has_several_deployments_and_no_keys():
    text = (EXAMPLES / "syphus" / "litellm.yaml").read_text()
    content = yaml.safe_load(text)
    names = [entry["model_name"] for entry in content["model_list"]]
    providers = {entry["litellm_params"]["model"].split("/")[0] for entry in content["model_list"]}
    assert names.count("annotator") == 3 and providers == {"openai", "anthropic", "hosted_vllm"}
    assert "--model annotator" in text
    (fallback,) = content["router_settings"]["fallbacks"]
    assert {*fallback, *fallback["annotator"]} <= set(names)
    keys = [entry["litellm_params"].get("api_key", "os.environ/") for entry in content["model_list"]]
    assert all(key.startswith("os.environ/") for key in [*keys, content["general_settings"]["master_key"]])
