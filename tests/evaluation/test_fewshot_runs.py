"""The few-shot harness through `otter-hf eval`, offline on parquet files."""

import json

import pytest
import torch
import yaml
from benchmark_rows import endpoint, run_two_processes, write_parquet
from PIL import Image, ImageColor

from otter_hf.cli import main
from otter_hf.pictures import read_image


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")

COLOURS = ("red", "blue", "green", "yellow", "black")


def rows(count: int, first: int = 0) -> list[dict]:
    """Columns for every kind of data set."""
    return [
        {
            "question_id": first + i,
            "image": Image.new("RGB", (30 + i, 24), COLOURS[i % 5]),
            "question": f"Colour of {first + i}?",
            "answers": [COLOURS[i % 5]] * 8 + ["pink", "grey"],
            "answer_type": "other" if i % 2 else "yes/no",
            "captions": [f"a {COLOURS[i % 5]} picture", "one colour"],
            "label": i % 2,
            "text": f"words {i}",
        }
        for i in range(count)
    ]


@pytest.fixture
def tables(tmp_path):
    """Training and test rows on disk: the keys of a few-shot data set."""
    return {
        "train": str(write_parquet(tmp_path / "train.parquet", rows(8, first=100))),
        "test": str(write_parquet(tmp_path / "test.parquet", rows(5))),
    }


@pytest.fixture
def evaluate(tmp_path):
    def run(models: list, datasets: list, output: str = "out", **more) -> dict:
        path = tmp_path / f"{output}.yaml"
        config = {"models": models, "datasets": datasets, "output": str(tmp_path / output), **more}
        path.write_text(yaml.safe_dump(config))
        assert main(["eval", str(path)]) == 0
        return json.loads((tmp_path / output / "results.json").read_text())

    return run


def samples(tmp_path, name: str, output: str = "out") -> list[dict]:
    (path,) = (tmp_path / output).rglob(f"{name}.samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_right_picture_is_worth(evaluate, tables, tmp_path, monkeypatch):
    """The endpoint says which colour the last picture has; a grey one is none of the answers."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def colour(text: str, body: dict) -> tuple[int, str]:
        urls = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
        pixel = read_image(urls[-1]).getpixel((3, 3))
        near = [(sum(abs(a - b) for a, b in zip(pixel, ImageColor.getrgb(c), strict=True)), c) for c in COLOURS]
        return 200, min(near)[1] if min(near)[0] < 60 else "nothing"

    with endpoint(colour) as (address, requests):
        model = {"name": "stub", "endpoint": address, "model": "stub", "batch_size": 4}
        dataset = {"name": "vqav2", **tables, "shots": [1]}
        figures = evaluate([model], [dataset], controls=True)["stub"]["vqav2"]
    told = figures["controls"]["1-shot vqa_accuracy"]
    assert figures["1-shot vqa_accuracy"] == 100.0 and len(requests) == 3 * 5
    assert told == {"swapped": 0.0, "blank": 0.0, "visual_gain": 100.0, "interval": [100.0, 100.0]}
    shown, blank = (samples(tmp_path, f"vqav2.1-shot.seed-42{end}") for end in ("", ".blank"))
    assert [row["demonstrations"] for row in shown] == [row["demonstrations"] for row in blank]


def test_controls_of_several_seeds_are_means_and_scored_once(evaluate, tables, tmp_path, monkeypatch):
    from otter_hf.evaluation.scoring import captions

    scored = []

    def by_length(records):
        scored.append(len(records))
        return [float(len(record["caption"]) + record["id"]) for record in records]

    monkeypatch.setattr(captions, "scores_of", by_length)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(lambda text: "red") as (address, _):
        model = {"name": "stub", "endpoint": address, "model": "stub", "batch_size": 4}
        dataset = {"name": "coco", **tables, "shots": [1], "seeds": [1, 2], "num_samples": 3}
        figures = evaluate([model], [dataset], controls=True)["stub"]["coco"]
    told = figures["controls"]["1-shot cider"]
    assert told["swapped"] == told["blank"] == figures["1-shot cider"] and told["visual_gain"] == 0.0
    assert figures["1-shot/seed 1"] != figures["1-shot/seed 2"] and scored == 6 * [3]


def test_seeds_that_ask_the_same_do_not_narrow_the_interval():
    from otter_hf.evaluation.fewshot.run import _gains

    generator = torch.Generator().manual_seed(0)
    ranked = {
        control: {row: (float(torch.rand((), generator=generator)), row % 2) for row in range(20)}
        for control in (None, "swapped", "blank")
    }
    answered = {control: {row: 100.0 * (p > 0.5) for row, (p, _) in of.items()} for control, of in ranked.items()}
    for kind, units in (("hateful_memes", ranked), ("vqa", answered)):
        once, thrice = (_gains(kind, {control: n * [of_seed] for control, of_seed in units.items()}) for n in (1, 3))
        assert thrice["interval"] == pytest.approx(once["interval"]) and once["interval"][0] < once["interval"][1]


def test_areas_of_several_seeds_are_not_pooled():
    from otter_hf.evaluation.fewshot.run import _gains

    # each seed tells its own classes apart, but they have no order in common; the second lacks row 3
    seeds = [{0: (0.1, 0), 1: (0.2, 1), 2: (0.1, 0), 3: (0.2, 1)}, {0: (0.8, 0), 1: (0.9, 1), 2: (0.8, 0)}]
    wrong = [{row: (1 - p, label) for row, (p, label) in of_seed.items()} for of_seed in seeds]
    told = _gains("hateful_memes", {None: seeds, "swapped": wrong, "blank": [seeds[0], wrong[1]]})
    assert (told["swapped"], told["blank"], told["visual_gain"]) == (0.0, 50.0, 100.0)


def test_answers_of_an_endpoint_with_the_most_similar_demonstrations(evaluate, tables, tmp_path, monkeypatch):
    """The encoder sees colours, of which each test picture shares its own with a training picture."""
    from otter_hf.evaluation.fewshot import demonstrations

    def mean_colour(pictures, encoder, batch_size):
        import torch

        return torch.tensor(
            [[1.0 + value for value in picture.resize((1, 1)).getpixel((0, 0))] for picture in pictures]
        )

    monkeypatch.setattr(demonstrations, "embed_images", mean_colour)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(lambda text: "red, I think Question: x") as (address, requests):
        dataset = {"name": "vqav2", **tables, "shots": [0, 2], "demonstrations": "rices", "encoder": "colours"}
        model = {"name": "stub", "endpoint": address, "model": "stub", "batch_size": 4}
        figures = evaluate([model], [dataset])["stub"]["vqav2"]
    # eight of ten annotators say red of one test row in five: full marks for that row
    assert figures["0-shot vqa_accuracy"] == figures["2-shot vqa_accuracy"] == 20.0
    by_type = [figures[f"2-shot answer_type/{kind}"] for kind in ("other", "yes/no")]
    assert by_type == [0.0, pytest.approx(100 / 3)]
    with_two = [request["messages"] for request in requests if len(request["messages"]) == 5]
    assert len(with_two) == 5 and len(requests) == 10
    for messages in with_two:
        kinds = [[part["type"] for part in m["content"]] for m in messages if m["role"] == "user"]
        assert kinds == [["image_url", "text"]] * 3
        assert messages[-1]["content"][-1]["text"].endswith("? Please answer in short words.")
    for sample in samples(tmp_path, "vqav2.2-shot.seed-42"):
        # training row i is of colour i % 5, as test row i is
        assert sample["demonstrations"][-1] % 5 == sample["row"] % 5
        assert sample["answer"] == "red"


def test_one_file_for_both_shows_no_row_its_answer(evaluate, tables, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(lambda text: "<think>blue?</think>red" if "100" in text else "") as (address, _):
        dataset = {"name": "vqav2", "train": tables["train"], "test": tables["train"], "shots": [4]}
        model = {"name": "stub", "endpoint": address, "model": "stub"}
        figures = evaluate([model], [dataset])["stub"]["vqav2"]
    shown = samples(tmp_path, "vqav2.4-shot.seed-42")
    assert len(shown) == 8 and all(sample["row"] not in sample["demonstrations"] for sample in shown)
    # row 100 is red to eight of ten; seven replies are empty
    assert figures["4-shot vqa_accuracy"] == 12.5 and figures["empty_replies"] == 7
    assert "none is shown its own answer" in caplog.text


def test_captions_by_seeds_are_the_same_again_and_say_their_tokenizer(otter_folder, evaluate, tables, tmp_path):
    pytest.importorskip("pycocoevalcap")
    dataset = {"name": "coco", **tables, "shots": [0, 2], "seeds": [1, 2], "num_samples": 4}
    model = {"path": str(otter_folder), "name": "tiny", "batch_size": 2, "generation": {"max_new_tokens": 3}}
    first = evaluate([model], [dataset])["tiny"]["coco"]
    assert first["tokenizer"] in ("PTB", "python")
    assert first["2-shot cider"] == pytest.approx((first["2-shot/seed 1"] + first["2-shot/seed 2"]) / 2)
    assert evaluate([model], [dataset], "again")["tiny"]["coco"] == first
    one, two = (samples(tmp_path, f"coco.2-shot.seed-{seed}") for seed in (1, 2))
    assert len(one) == len(two) == 4
    assert [s["demonstrations"] for s in one] != [s["demonstrations"] for s in two]
    assert samples(tmp_path, "coco.2-shot.seed-1", "again") == one


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_rankings(family, request, evaluate, tables, tmp_path):
    folder = request.getfixturevalue(f"{family}_folder")
    datasets = [
        {"name": "imagenet", **tables, "shots": [1], "class_names": ["a warm colour", "cold"]},
        {"name": "hateful_memes", **tables, "shots": [0, 2]},
    ]
    results = evaluate([{"path": str(folder), "name": "tiny", "batch_size": 2}], datasets)["tiny"]
    assert results["imagenet"]["1-shot top1_accuracy"] in (0, 20, 40, 60, 80, 100)
    scored = samples(tmp_path, "hateful_memes.2-shot.seed-42")
    # the area under the curve of P(yes), by pairs
    yes = [1 / (1 + 2.718281828459045 ** (s["log_likelihoods"][0] - s["log_likelihoods"][1])) for s in scored]
    positive, negative = ([p for p, s in zip(yes, scored, strict=True) if s["label"] == label] for label in (1, 0))
    pairs = [(p, n) for p in positive for n in negative]
    by_hand = 100 * sum(p > n for p, n in pairs) / len(pairs)
    assert results["hateful_memes"]["2-shot roc_auc"] == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "imagenet"}, "needs `class_names`"),
        ({"name": "imagenet", "class_names": ["n01440764", "n01443537"]}, "are called n01440764 and so on, no words"),
        ({"test_split": 7}, "test_split 7; it must be a text"),
        ({"shots": [9]}, "9 shots need as many training rows, there are 8"),
        ({"demonstrations": "rices"}, "rices with an `encoder`"),
        ({"columns": {"answers": "nothing"}}, "no column for 'answers'"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(change, message, otter_folder, tables, tmp_path, capsys):
    config = {"models": [str(otter_folder)], "output": str(tmp_path / "out")}
    config["datasets"] = [{"name": "vqav2", "shots": [1], **tables, **change}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_score_every_row_once(otter_folder, evaluate, tables, tmp_path):
    """Five rows: one process has one more than the other."""
    model = {"path": str(otter_folder), "name": "tiny", "batch_size": 2, "generation": {"max_new_tokens": 3}}
    datasets = [
        {"name": "vqav2", **tables, "shots": [2]},
        {"name": "hateful_memes", **tables, "shots": [1]},
    ]
    alone = evaluate([model], datasets)
    config = yaml.safe_load((tmp_path / "out.yaml").read_text())
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**config, "output": str(tmp_path / "two")}))
    run_two_processes(tmp_path / "two.yaml")
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert together["tiny"]["vqav2"] == alone["tiny"]["vqav2"]
    assert together["tiny"]["hateful_memes"] == alone["tiny"]["hateful_memes"]
    for name in ("vqav2.2-shot.seed-42", "hateful_memes.1-shot.seed-42"):
        one, two = samples(tmp_path, name), samples(tmp_path, name, "two")
        assert [sample["row"] for sample in two] == [0, 1, 2, 3, 4]
        assert [s["demonstrations"] for s in two] == [s["demonstrations"] for s in one]
