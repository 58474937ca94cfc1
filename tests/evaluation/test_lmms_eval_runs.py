"""`otter-hf eval` through lmms-eval, offline on parquet files: figures against those worked out by hand."""

import json
import os
import signal
import subprocess
import sys

import benchmark_rows
import pytest
import torch
import yaml
from benchmark_rows import endpoint, run_two_processes, write_parquet
from PIL import ImageFile

from otter_hf.cli import main
from otter_hf.pictures import read_image


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")

ALL = ("magnifierbench", "mme", "pope", "mmbench", "scienceqa", "seedbench", "mmvet", "mathvista")


@pytest.fixture
def evaluate(tmp_path):
    """Runs a configuration by the command; returns results.json."""

    def run(config: dict, output: str = "out") -> dict:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), **config}))
        assert main(["eval", str(path)]) == 0
        return json.loads((tmp_path / output / "results.json").read_text())

    return run


@pytest.fixture
def answering(monkeypatch):
    """An endpoint that answers by a function of the question; the judge is asked there too."""
    servers = []

    def start(reply):
        server = endpoint(reply)
        address, requests = server.__enter__()
        servers.append(server)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        return address, requests

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def at(address: str) -> dict:
    return {"name": "stub", "endpoint": address, "model": "stub", "batch_size": 8}


def test_mme_of_a_model_that_always_says_yes(evaluate, answering, data):
    address, requests = answering(lambda text: "Yes")
    datasets = [{"name": "mme", "data_path": data("mme")}]
    # the name holds that of o3, which lmms-eval tells no temperature
    model = {**at(address), "model": "flamingo3b", "generation": {"max_new_tokens": 4096, "temperature": 0.5}}
    figures = evaluate({"models": [model], "datasets": datasets})["stub"]["mme"]
    assert {(request["max_tokens"], request["temperature"]) for request in requests} == {(4096, 0.5)}
    assert figures["perception"] == 50.0 and figures["cognition"] == 50.0
    assert figures["category/existence"] == 50.0
    # the original prompt, not lmms-eval's
    texts = [part["text"] for r in requests for part in r["messages"][0]["content"] if part["type"] == "text"]
    assert len(texts) == 6 and all(text.endswith("Please answer yes or no.") for text in texts)


def test_mme_full_marks_in_the_columns_of_2023(evaluate, answering, data):
    address, _ = answering(lambda text: "Yes." if "Yes?" in text else "No, not there")
    datasets = [{"name": "mme", "data_path": data("mme_of_2023")}]
    figures = evaluate({"models": [at(address)], "datasets": datasets})["stub"]["mme"]
    assert figures["category/existence"] == 200.0 and figures["category/code_reasoning"] == 200.0
    assert figures["perception"] == 200.0 and figures["cognition"] == 200.0


def test_pope_by_the_official_rule(evaluate, answering, data):
    # rows 0..3 of a setting are yes, yes, no, no
    said = {"0": "Yes, there is.", "1": "There is not.", "2": "Yes, there is.", "3": "No"}
    address, _ = answering(lambda text: said[text[text.index("a ") + 2]])
    figures = evaluate({"models": [at(address)], "datasets": [{"name": "pope", "data_path": data("pope")}]})
    figures = figures["stub"]["pope"]
    assert figures["accuracy"] == figures["precision"] == figures["recall"] == figures["f1"] == 50.0
    assert figures["random/f1"] == figures["mean_f1"] == 50.0 and figures["yes_ratio"] == 50.0


def test_mmbench_by_turns_with_a_table_for_its_server(evaluate, answering, data, tmp_path):
    def reply(text):
        letter = next(line[0] for line in text.splitlines() if line.endswith(". dog"))
        return letter if "What is 7?" in text else "A"

    address, _ = answering(reply)
    figures = evaluate({"models": [at(address)], "datasets": [{"name": "mmbench", "data_path": data("mmbench")}]})
    assert figures["stub"]["mmbench"] == {
        "circular_accuracy": 50.0,
        "vanilla_accuracy": 100.0,
        "questions": 2,
        "category/animals": 50.0,
        "l2-category/perception": 50.0,
    }
    import pandas as pd

    table = pd.read_excel(tmp_path / "out" / "stub" / "mmbench_submission.xlsx")
    assert len(table) == 6 and {"index", "prediction", "A", "l2-category"} <= set(table.columns)
    assert table["prediction"].tolist() == ["A", "D", "C", "B", "A", "A"]


def test_mmbench_without_answers_writes_the_table_only(evaluate, answering, data):
    address, _ = answering(lambda text: "A")
    datasets = [{"name": "mmbench", "data_path": data("mmbench", answers=False), "split": "test"}]
    assert evaluate({"models": [at(address)], "datasets": datasets})["stub"]["mmbench"] == {"questions": 2}


def test_scienceqa(evaluate, answering, data):
    address, requests = answering(lambda text: "The answer is A.")
    figures = evaluate({"models": [at(address)], "datasets": [{"name": "scienceqa", "data_path": data("scienceqa")}]})
    figures = figures["stub"]["scienceqa"]
    # answers A, B, C, A; the first two have pictures
    assert figures["accuracy"] == 50.0 and figures["image_accuracy"] == 50.0
    assert figures["subject/social science"] == 100.0
    kinds = [[part["type"] for part in request["messages"][0]["content"]] for request in requests]
    assert sorted(map(len, kinds)) == [1, 1, 2, 2]


JUDGEMENTS = {"0": "yes", "1": "Yes.", "2": "garbage", "3": 500}


def test_magnifierbench_with_a_judge_that_fails(evaluate, answering, tmp_path):
    rows = [
        {"id": str(i), "images": [benchmark_rows.RED], "instruction": f"What is {i}? {benchmark_rows.OPTIONS}"}
        for i in range(4)
    ]
    rows = [{**row, "answer": "B"} for row in rows]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    letters = {"0": "B", "1": "A cat", "2": "The answer is C", "3": "nothing"}

    def reply(text):
        if "Ground Truth" in text:
            assert "Ground Truth: cat" in text
            return JUDGEMENTS[text[text.index("What is ") + 8]]
        return letters[text[text.index("What is ") + 8]]

    address, requests = answering(reply)
    config = {"models": [at(address)], "judge": {"model": "the-judge", "max_retries": 0}}
    datasets = [{"name": "magnifierbench", "data_path": str(path)}]
    figures = evaluate({**config, "datasets": datasets})["stub"]["magnifierbench"]
    assert figures["accuracy"] == 50.0 and figures["unparsed"] == 1
    assert figures["freeform_accuracy"] == 50.0 and figures["freeform_accuracy_of_judged"] == 100.0
    assert figures["judge_invalid"] == 1 and figures["judge_failed"] == 1

    # a second run asks only the judge that failed; the legacy parse takes "A cat" for A
    del requests[:]
    JUDGEMENTS["3"] = "no"
    datasets[0]["legacy_parse"] = True
    figures = evaluate({**config, "datasets": datasets})["stub"]["magnifierbench"]
    assert [request["model"] for request in requests] == ["the-judge"]
    assert figures["accuracy"] == 25.0 and figures["judge_failed"] == 0
    JUDGEMENTS["3"] = 500


def test_mmvet_grades(evaluate, answering, data):
    def reply(text):
        if "Predict the correctness" in text:
            return "0.5"
        if "Correctness" in text:
            assert text.startswith("Compare the ground truth")  # MM-Vet's own examples
            return "well" if "2 <AND> 3" in text else "1.0"
        return "two"

    address, _ = answering(reply)
    datasets = [{"name": "mmvet", "data_path": data("mmvet"), "gpt_model": "the-judge", "num_run": 2}]
    figures = evaluate({"models": [at(address)], "datasets": datasets})["stub"]["mmvet"]
    assert figures["total"] == 75.0 and figures["total_std"] == 0.0 and figures["judge_failures"] == 0
    assert figures["capability/math"] == 50.0 and figures["capability/rec"] == 75.0


def test_mathvista_extracts_by_a_judge_and_counts_what_it_could_not(evaluate, answering, data, monkeypatch):
    def reply(text):
        if "Extracted answer:" in text:
            return "1.24" if "How long?" in text else "(B)"
        return "about that"

    address, _ = answering(reply)
    datasets = [{"name": "mathvista", "data_path": data("mathvista")}]
    figures = evaluate({"models": [at(address)], "datasets": datasets})["stub"]["mathvista"]
    assert figures["accuracy"] == 100.0 and figures["extraction_failures"] == 0 and figures["skills/algebra"] == 100.0


def test_a_request_that_fails_is_counted_and_asked_again(evaluate, answering, data):
    failing = [True]
    address, requests = answering(lambda text: 400 if failing[0] and "a Yes?" in text else "Yes")
    models = [{**at(address), "batch_size": 6}]
    config = {"models": models, "datasets": [{"name": "mme", "data_path": data("mme")}]}
    assert evaluate(config)["stub"]["mme"]["failed_requests"] == 1
    failing[0] = False
    del requests[:]
    figures = evaluate(config)["stub"]["mme"]
    assert "failed_requests" not in figures and figures["perception"] == 50.0
    assert len(requests) == 1, "what was asked with it has its replies"


def is_red(text: str, body: dict) -> tuple[int, str]:
    """A model that looks: yes where the picture is red."""
    (url,) = (part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
    red, _, blue = read_image(url).getpixel((3, 3))
    return 200, "yes" if red > 200 > blue else "no"


def coloured(rows: list[dict]) -> list[dict]:
    """Pictures red where the answer is yes, blue where it is no."""
    pictures = {"yes": benchmark_rows.RED, "no": benchmark_rows.BLUE}
    return [{**row, "image": pictures[row["answer"].lower()]} for row in rows]


def test_what_the_right_picture_is_worth_to_a_model_that_looks(evaluate, answering, tmp_path):
    address, requests = answering(is_red)
    path = write_parquet(tmp_path / "pope.parquet", coloured(benchmark_rows.pope()))
    config = {"models": [at(address)], "datasets": [{"name": "pope", "data_path": str(path)}], "controls": True}
    figures = evaluate(config)["stub"]["pope"]
    # another picture is one of the other colour; grey is not red
    told = figures["controls"]["accuracy"]
    assert figures["accuracy"] == 100.0 and set(figures["controls"]) == {"accuracy", "f1"}
    assert told == {"swapped": 0.0, "blank": 50.0, "visual_gain": 100.0, "interval": [100.0, 100.0]}
    lines = (tmp_path / "out" / "report.txt").read_text().splitlines()
    assert lines[0].split()[3:] == ["value", "swapped", "blank", "visual", "gain", "(95", "%)"]
    assert lines[2].split()[3:] == ["100.00", "0.00", "50.00", "+100.00", "(+100.00", "to", "+100.00)"]
    samples = (tmp_path / "out" / "stub" / "otter_pope.blank.samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in samples} == {"no"}
    # what is answered is not asked again
    assert evaluate(config)["stub"]["pope"] == figures and len(requests) == 3 * 12


def test_a_model_that_does_not_look_gains_nothing(otter_folder, model, evaluate, no_key, tmp_path):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.zero_()
    model.save_pretrained(otter_folder)
    path = write_parquet(tmp_path / "coloured.parquet", coloured(benchmark_rows.pope()))
    spec = {"path": str(otter_folder), "name": "tiny", "batch_size": 12, "generation": {"max_new_tokens": 2}}
    datasets = [{"name": "pope", "data_path": str(path)}]
    figures = evaluate({"models": [spec], "datasets": datasets, "controls": True})["tiny"]["pope"]
    told = figures["controls"]["accuracy"]
    assert told["visual_gain"] == 0.0 and told["interval"] == [0.0, 0.0]
    assert told["swapped"] == told["blank"] == figures["accuracy"]
    replies = [
        [json.loads(line)["replies"] for line in (tmp_path / "out" / "tiny" / name).read_text().splitlines()]
        for name in ("otter_pope.samples.jsonl", "otter_pope.swapped.samples.jsonl", "otter_pope.blank.samples.jsonl")
    ]
    assert replies[0] == replies[1] == replies[2]


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_every_benchmark_runs_on_a_tiny_model(family, request, evaluate, answering, data, tmp_path):
    """The judge likes everything."""
    answering(lambda text: "yes" if "Ground Truth" in text else "1.0")
    folder = request.getfixturevalue(f"{family}_folder")
    model = {"path": str(folder), "name": "tiny", "batch_size": 3, "generation": {"max_new_tokens": 3}}
    datasets = [{"name": name, "data_path": data(name)} for name in ALL]
    results = evaluate({"models": [model], "datasets": datasets})["tiny"]
    assert list(results) == list(ALL)
    assert results["magnifierbench"]["freeform_accuracy"] == 100.0 and results["mmvet"]["total"] == 100.0
    assert results["seedbench"]["questions"] == 4 and results["mme"]["incomplete_images"] == 0
    samples = (tmp_path / "out" / "tiny" / "otter_seedbench_ppl.samples.jsonl").read_text().splitlines()
    for line in map(json.loads, samples):
        assert line["prediction"] == "ABCD"[line["losses"].index(min(line["losses"]))]
    report = (tmp_path / "out" / "report.txt").read_text()
    assert all(name in report for name in ALL)


def test_the_yaml_of_2023(otter_folder, otterhd_folder, evaluate, data, no_key, tmp_path):
    config = {
        "models": [
            {"name": "otter_image", "model_path": str(otter_folder), "load_bit": "fp32", "max_new_tokens": 3},
            {"name": "otterhd", "model_path": str(otterhd_folder), "resolution": 40, "max_new_tokens": 3},
        ],
        "datasets": [
            {"name": "magnifierbench", "data_path": data("magnifierbench"), "prompt": "Answer with the letter."},
            {"name": "pope", "data_path": data("pope"), "debug": True},
        ],
        "output": str(tmp_path / "out.txt"),
    }
    results = evaluate(config)
    # Pillow goes on refusing what is truncated, once lmms-eval is no longer at work
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert list(results) == ["otter_image", "otterhd"]
    # no key: no free form; the row with two pictures is left out; debug leaves none out
    assert "freeform_accuracy" not in results["otterhd"]["magnifierbench"]
    assert results["otterhd"]["magnifierbench"]["questions"] == 3
    lines = (tmp_path / "out" / "otterhd" / "otter_pope.samples.jsonl").read_text().splitlines()
    assert len(lines) == 12
    first = (tmp_path / "out" / "otterhd" / "otter_magnifierbench.samples.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["prompt"].startswith("Answer with the letter. What is animal 0?")


def test_an_interrupted_evaluation_goes_on_to_the_same_result(
    otter_folder, evaluate, data, no_key, tmp_path, monkeypatch
):
    from otter_hf.evaluation.model import ConversationModel

    drawn = {"max_new_tokens": 3, "temperature": 1.5}
    model = {"path": str(otter_folder), "name": "tiny", "batch_size": 2, "generation": drawn}
    datasets = [{"name": name, "data_path": data(name)} for name in ("pope", "seedbench")]
    config = {"models": [model], "datasets": datasets}
    evaluate(config)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file() and "replies" not in path.name)
    whole = {path: path.read_bytes() for path in files}

    asked = []
    generate = ConversationModel._generate

    def dying(self, batch, options):
        asked.append(len(batch.numbers))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return generate(self, batch, options)

    monkeypatch.setattr(ConversationModel, "_generate", dying)
    config["output"] = str(tmp_path / "again")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["eval", str(path)]) == 130
    # a line cut off by the kill
    with next((tmp_path / "again").rglob("replies-0.jsonl")).open("a") as replies:
        replies.write('{"key": "half')
    assert main(["eval", str(path)]) == 0
    assert asked == [2] * 7  # six batches, one of them twice
    for path, content in whole.items():
        assert (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes() == content
    del asked[:]
    monkeypatch.setattr(ConversationModel, "__init__", lambda self, **kwargs: pytest.fail("nothing is left to ask"))
    assert main(["eval", str(tmp_path / "again.yaml")]) == 0


def test_a_group_of_which_all_is_answered_is_not_prepared(otter_folder, monkeypatch):
    """Two kinds of questions in a window: of those without a missing reply no picture is read."""
    from lmms_eval.api.instance import Instance

    from otter_hf.evaluation.lmms import TransformersModel

    class Answering:
        def answers(self, conversations, until, chat_template, batch_size, wanted, seed, **options):
            yield {place: f"{text} {sorted(wanted)}" for place, text in enumerate(conversations)}

    lm = TransformersModel(otter_folder, batch_size=4)
    lm.conversation_model = Answering()
    read = []
    monkeypatch.setattr(lm, "messages", lambda request: read.append(request.args[3]) or f"row {request.args[3]}")
    told = {"task": "task", "doc_id": 0, "repeats": 1}
    window = [
        Instance("generate_until", ("", None, {"max_new_tokens": 1 + i // 2}, i, "task", "test"), 0, told)
        for i in range(4)
    ]
    assert list(lm._ask(window, {3})) == [{2: "row 2 [1]", 3: "row 3 [1]"}] and read == [2, 3]


def test_replies_of_a_model_that_has_changed_are_not_used(otter_folder, evaluate, data, no_key, monkeypatch, caplog):
    from otter_hf.evaluation.model import ConversationModel

    answers = []

    def say_yes(self, conversations, *args, **kwargs):
        answers.append(1)
        yield dict.fromkeys(range(len(list(conversations))), "yes")

    monkeypatch.setattr(ConversationModel, "answers", say_yes)
    model = {"path": str(otter_folder), "name": "tiny", "batch_size": 12}
    config = {"models": [model], "datasets": [{"name": "pope", "data_path": data("pope")}]}
    evaluate(config), evaluate(config)
    assert len(answers) == 1
    weights = otter_folder / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))  # as after another training
    evaluate(config)
    assert len(answers) == 2 and f"{otter_folder} has changed since: everything is asked anew" in caplog.text


def test_a_killed_evaluation_asks_only_what_is_not_answered(evaluate, data, tmp_path, monkeypatch):
    """SIGKILL while the fifth question is being answered."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    process = None

    def reply(text):
        if process is not None and len(requests) == 5:
            process.kill()
        return "Yes" if "1" in text else "No"

    def asked() -> list[str]:
        return [request["messages"][-1]["content"][-1]["text"] for request in requests]

    with endpoint(reply) as (address, requests):
        model = {**at(address), "batch_size": 1}
        config = {"models": [model], "datasets": [{"name": "pope", "data_path": data("pope")}]}
        whole = evaluate(config, "whole")
        questions = asked()
        del requests[:]

        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**config, "output": str(tmp_path / "out")}))
        process = subprocess.Popen([sys.executable, "-m", "otter_hf.cli", "eval", path], stderr=subprocess.DEVNULL)
        assert process.wait(timeout=300) == -signal.SIGKILL
        assert asked() == questions[:5] and not (tmp_path / "out" / "results.json").exists()
        del requests[:]

        process = None
        assert evaluate(config) == whole
        assert asked() == questions[4:]
    for written in (tmp_path / "whole").rglob("*.samples.jsonl"):
        assert (tmp_path / "out" / written.relative_to(tmp_path / "whole")).read_bytes() == written.read_bytes()


def test_pictures_are_named_in_a_table_and_lie_in_a_folder(evaluate, answering, tmp_path, capsys):
    """Rows of one's own, in a JSON file: beside it, or in `image_dir`. A row without a picture is no question."""
    address, _ = answering(is_red)
    rows = [
        {"question": f"{i}?", "answer": answer, "category": "random", "image": f"{answer}.png"}
        for i, answer in enumerate(("yes", "no"))
    ]
    for row in coloured(rows):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        row["image"].save(tmp_path / "pictures" / f"{row['answer']}.png")
    for data, places in (("rows.json", {"image_dir": str(tmp_path / "pictures")}), ("pictures/rows.json", {})):
        (tmp_path / data).write_text(json.dumps(rows))
        dataset = {"name": "pope", "data_path": str(tmp_path / data), **places}
        assert evaluate({"models": [at(address)], "datasets": [dataset]})["stub"]["pope"]["accuracy"] == 100.0
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {**rows[0], "id": "r3", "image": None}]))
    dataset = {"name": "pope", "data_path": str(tmp_path / "rows.json"), "image_dir": str(tmp_path / "pictures")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"models": [at(address)], "datasets": [dataset]}))
    assert main(["eval", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "more")]) == 2
    assert capsys.readouterr().err.endswith("Row 'r3' has no picture: take it out of the data.\n")


def test_lmms_eval_finds_the_model_and_the_tasks_by_themselves(otter_folder, data, tmp_path, no_key):
    """`lmms-eval --model otter --tasks .. --include_path ..`, without our command."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from otter_hf.evaluation.run import TASK_FOLDER

    task = tmp_path / "tasks"
    task.mkdir()
    for name, base in (("pope", "otter_pope"), ("seedbench", "otter_seedbench_ppl_official")):
        local = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": data(name)}}}
        local = {"include": str(TASK_FOLDER / f"{base}.yaml"), "task": f"my_{name}", **local}
        (task / f"{name}.yaml").write_text(yaml.safe_dump(local))
    output = simple_evaluate(
        model="otter",
        model_args=f"path={otter_folder},dtype=float32",
        batch_size=2,
        tasks=["my_pope", "my_seedbench"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        gen_kwargs="max_new_tokens=2",
        bootstrap_iters=0,
    )
    assert output["n-samples"]["my_pope"]["effective"] == 12
    assert 0 <= output["results"]["my_pope"]["f1,none"] <= 100
    assert output["results"]["my_seedbench"]["accuracy,none"] in (0, 25, 50, 75, 100)


def test_how_lmms_eval_calls_a_model():
    from otter_hf.evaluation.lmms import TransformersModel

    assert TransformersModel(pretrained="a/b", batch_size="3")._loading["path"] == "a/b"
    for arguments, message in (
        ({"path": "a", "batch_size": "auto"}, "`batch_size` is 'auto'; it must be a whole"),
        ({}, "Say which model it is"),
        ({"path": "a", "pretrained": "b"}, "and not both"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformersModel(**arguments)


@pytest.mark.slow
def test_a_task_of_lmms_eval_by_its_name(otter_folder, evaluate, monkeypatch, no_key, tmp_path):
    """Its data are on the Hub; the tests give it ours. Finding it takes lmms-eval a while."""
    import datasets

    rows = [{**row, "hint": ""} for row in benchmark_rows.scienceqa()[:2]]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    local = datasets.load_dataset("parquet", data_files={"test": str(path)})
    monkeypatch.setattr(datasets, "load_dataset", lambda **kwargs: local)
    model = {"path": str(otter_folder), "name": "tiny", "generation": {"max_new_tokens": 2}}
    figures = evaluate({"models": [model], "datasets": ["scienceqa_img"], "limit": 2})["tiny"]["scienceqa_img"]
    assert figures["exact_match,none"] in (0.0, 0.5, 1.0)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(otter_folder, evaluate, data, no_key, tmp_path):
    model = {"path": str(otter_folder), "name": "tiny", "batch_size": 2, "generation": {"max_new_tokens": 3}}
    config = {"models": [model], "datasets": []}
    # 3 rows: one process has one more than the other
    for name in ("magnifierbench", "seedbench"):
        config["datasets"].append({"name": name, "data_path": data(name)})
    alone = evaluate(config)
    config["output"] = str(tmp_path / "two")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    run_two_processes(tmp_path / "two.yaml")
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == alone
    paths = sorted((tmp_path / "out" / "tiny").glob("*.samples.jsonl"))
    assert len(paths) == 2
    for path in paths:
        of_two, of_one = (
            [json.loads(line) for line in (tmp_path / folder / "tiny" / path.name).read_text().splitlines()]
            for folder in ("two", "out")
        )
        for record, expected in zip(of_two, of_one, strict=True):
            if "losses" in expected:  # candidates share other batches: sums in another order
                assert record.pop("losses") == pytest.approx(expected.pop("losses"), abs=1e-5)
                assert len(record.pop("replies")) == len(expected.pop("replies"))
            assert record == expected
