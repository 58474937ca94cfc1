"""Runs without an endpoint: batch files, their results, and commands that answer them."""

import json
import os
import sys

import pytest
from syphus_model import REPLY, Model, ask

from otter_hf.cli import main
from otter_hf.data.engine import Engine
from otter_hf.production.syphus import Budget
from otter_hf.production.syphus.batch import custom_id, read_batch_results, write_batch_files
from otter_hf.production.syphus.offline import answer_offline


def results(path, outcome):
    """A provider's answers to a batch file: `outcome(number of the line)` is a text, or a status."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines()):
        text = outcome(number)
        if isinstance(text, str):
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            message = {"role": "assistant", "content": text}
            body = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": usage}
            response = {"status_code": 200, "body": body}
        else:
            response = {"status_code": text, "body": {"error": {"message": "too long"}}}
        lines.append(json.dumps({"custom_id": json.loads(line)["custom_id"], "response": response, "error": None}))
    return "\n".join(reversed(lines)) + "\n"


def test_batch_files(make_run, tmp_path):
    run = make_run(5, options={"temperature": 0, "top_p": None})
    paths = write_batch_files(run, max_requests=2)
    assert [path.name for path in paths] == [f"requests-0000{n}.jsonl" for n in range(3)]
    requests = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert requests[3] == {
        "custom_id": custom_id(3, "3"),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": run.messages(list(run.queries())[3]),
            "temperature": 0,
            "max_tokens": 3200,
        },
    }
    assert len({request["custom_id"] for request in requests}) == 5
    # neither asked nor written twice
    model = Model()
    assert ask(run, model).in_batch == 5 and not model.asked and write_batch_files(run) == []

    done = tmp_path / "results.jsonl"
    done.write_text(results(paths[0], lambda n: f"Question: {n}?\nAnswer: yes") + results(paths[1], lambda n: 400))
    summary, new = read_batch_results(run, [done], Budget(prompt_price=1e6))
    assert (new, summary.replies, summary.failed, summary.in_batch) == (4, 2, 2, 1)
    assert summary.reasons == {"HTTP 400: too long": 2} and (summary.prompt_tokens, summary.cost) == (20, 20.0)
    with run.journal() as journal:
        assert journal.reply("1")["text"] == "Question: 1?\nAnswer: yes"
    # again: replies and failures are known
    assert read_batch_results(run, [done]) == (summary, 0)
    retried = write_batch_files(run, retry_failed=True, max_bytes=1)
    assert [path.name for path in retried] == [f"requests-0000{n}.jsonl" for n in (3, 4, 5)]
    assert ask(run, model, retry_failed=True).replies == 5 and sorted(model.asked) == ["2", "3", "4"]


def test_results_of_another_run_are_refused(make_run, tmp_path):
    run, other = make_run(2), make_run(3, "other", start=1)
    path = tmp_path / "results.jsonl"
    path.write_text(results(write_batch_files(other)[0], lambda n: "x"))
    with pytest.raises(ValueError, match="Line 1 of .* answers request '1-.*', which is not of the run in"):
        read_batch_results(run, [path])
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="Line 1 of .* is no result of a batch"):
        read_batch_results(run, [path])
    assert run.summary().replies == 0


VLLM = """#!{python}
import json, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
open({calls!r}, "a").write(given["--input-file"].split("/")[-1] + "\\n")
assert sys.argv[1] == "run-batch" and given["--model"] == "m"
with open(given["--input-file"]) as requests, open(given["--output-file"], "w") as results:
    for line in requests:
        request = json.loads(line)
        message = {{"role": "assistant", "content": "Question: What is new?\\nAnswer: A car."}}
        body = {{"choices": [{{"index": 0, "message": message, "finish_reason": "stop"}}],
                "usage": {{"prompt_tokens": 5, "completion_tokens": 3}}}}
        response = {{"status_code": 200, "request_id": "r", "body": body}}
        results.write(json.dumps({{"id": "vllm-1", "custom_id": request["custom_id"], "response": response,
                                  "error": None}}) + "\\n")
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A `vllm` on the path that answers everything; gives the file that tells when it was called."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vllm"
    program.write_text(VLLM.format(python=sys.executable, calls=str(calls)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return calls


@pytest.mark.parametrize("engine", [None, pytest.param(Engine(tasks=2, workers=2), marks=pytest.mark.slow)])
def test_a_command_answers_batch_files(make_run, vllm, engine):
    run = make_run(5)
    ask(run, Model(), Budget(max_requests=1), concurrency=1)
    summary = answer_offline(run, max_requests=2, engine=engine)
    assert (summary.replies, summary.in_batch, summary.pending) == (5, 0, 0)
    assert sorted(vllm.read_text().split()) == ["requests-00000.jsonl", "requests-00001.jsonl"]
    # nothing is left to do, and nothing is done
    assert answer_offline(run).replies == 5 and len(vllm.read_text().split()) == 2


def test_a_command_that_fails(make_run, tmp_path, vllm, capsys):
    """The files that it has answered are kept, and the next call goes on."""
    run = make_run(4)
    for command, message in (
        ("vllm run-batch --input-file {input}", "must hold {input} and {output}"),
        ("vllm {input} {output} {prompt}", "'prompt'.*it may hold {input}, {output} and {model}"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_offline(run, command)
    assert run.summary().in_batch == 0
    fails = tmp_path / "fails.sh"
    answers = 'exec vllm run-batch --input-file "$1" --output-file "$2" --model m'
    fails.write_text(f'case "$1" in *00001*) exit 3;; esac\n{answers}')
    with pytest.raises(ValueError, match="sh ended with status 3 for .*requests-00001.jsonl"):
        answer_offline(run, f"sh {fails} {{input}} {{output}}", max_requests=2)
    with pytest.raises(ValueError, match="The command gone cannot be run"):
        answer_offline(run, "gone {input} {output}")
    with pytest.raises(ValueError, match="true wrote no results"):
        answer_offline(run, "true {input} {output}")
    folder = run.folder / "batch"
    assert [path.name for path in folder.glob("results-*")] == ["results-00000.jsonl"]
    assert main(["syphus", "resume", str(run.folder), "--batch-command"]) == 0
    assert "4 of 4 queries answered" in capsys.readouterr().out and len(vllm.read_text().split()) == 2


def test_results_that_are_none(make_run, tmp_path, vllm):
    """Who deletes them has their file answered again; a retry answers what is open, and that once."""
    run = make_run(4)
    junk, fails = tmp_path / "junk.sh", tmp_path / "fails.sh"
    junk.write_text('echo junk > "$2"')
    answers = 'exec vllm run-batch --input-file "$1" --output-file "$2" --model m'
    fails.write_text(f'case "$1" in *00001*) exit 3;; esac\n{answers}')
    with pytest.raises(ValueError, match="Line 1 of .*results-00000.jsonl is no result of a batch"):
        answer_offline(run, f"sh {junk} {{input}} {{output}}", max_requests=2)
    folder = run.folder / "batch"
    for path in folder.glob("results-*"):
        path.unlink()
    (folder / ".results-00001.jsonl.0.incomplete").touch()  # of a command that was killed
    with pytest.raises(ValueError, match="sh ended with status 3 for .*requests-00001.jsonl"):
        answer_offline(run, f"sh {fails} {{input}} {{output}}")
    summary = answer_offline(run, retry_failed=True)
    assert (summary.replies, summary.in_batch) == (4, 0)
    assert vllm.read_text().split() == ["requests-00000.jsonl", "requests-00002.jsonl"]
    assert not list(folder.glob("*.incomplete"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-files", "--batch-command"], "--batch-files and --batch-command are two ways to go on"),
        (["--workers", "2"], "are for --batch-command"),
        (["--batch-requests", "2"], "--batch-requests is for"),
        (["--batch-command", "--max-requests", "3"], "--max-requests is for requests to an endpoint"),
        (["--batch-command", "--concurrency", "2"], "--concurrency is for requests to an endpoint"),
        (["--batch-results", "x", "--retry-failed"], "retry what failed with --retry-failed behind it"),
        (["--batch-files", "--prompt-price", "1"], "Prices are of replies, and --batch-files has none"),
        (["--batch-files", "--base-url", "http://x/v1"], "--base-url is for requests to an endpoint"),
    ],
)
def test_ways_that_do_not_go_together(make_run, capsys, options, message):
    assert main(["syphus", "resume", str(make_run(1).folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_run_handed_to_slurm_is_resumed(make_run, monkeypatch, capsys):
    """Its own command would be refused, as the run is there."""
    monkeypatch.setattr("otter_hf.production.syphus.offline.answer_offline", lambda *args, **options: None)
    assert main(["syphus", "resume", str(make_run(1).folder), "--batch-command"]) == 0
    assert "handed to Slurm: `otter-hf syphus resume` with these options tells" in capsys.readouterr().out


def test_batches_by_command(make_run, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    arguments = ["change.SpotTheDifference", "--annotations", str(tmp_path / "sd.json"), "--model", "m"]
    make_run(1, "unused")  # writes the annotations
    folder = str(tmp_path / "batched")
    assert main(["syphus", "run", *arguments, "--output", folder, "--shard", "0/10", "--batch-files"]) == 0
    (path,) = (tmp_path / "batched" / "batch").iterdir()
    assert capsys.readouterr().out == f"{path}\n"
    (tmp_path / "results.jsonl").write_text(results(path, lambda n: REPLY.format(id=n)))
    assert main(["syphus", "resume", folder, "--batch-results", str(tmp_path / "results.jsonl")]) == 0
    assert "3 new results\n3 of 3 queries answered" in capsys.readouterr().out
    assert main(["syphus", "build", folder, "--output", str(tmp_path / "out"), "--name", "B"]) == 0
    assert "3 records of 3 replies to 3 queries" in capsys.readouterr().out
