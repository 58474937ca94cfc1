"""Runs: budgets, attempts, resuming, batch files; with a model in this process, which answers as it is told."""

import json
import os
import sys
import threading
import time

import pytest

from otter_hf.cli import main
from otter_hf.data.engine import Engine
from otter_hf.files import claim
from otter_hf.production.syphus import Budget, ChatReply, SyphusRun
from otter_hf.production.syphus.batch import custom_id, read_batch_results, write_batch_files
from otter_hf.production.syphus.client import EndpointError, RejectedError, TransientError
from otter_hf.production.syphus.journal import Journal
from otter_hf.production.syphus.offline import answer_offline


REPLY = "Question: Q of {id}?\nAnswer: A of {id}."


class Model:
    """Answers with 100 + 20 tokens; `script` gives the outcomes of an id's first attempts."""

    def __init__(self, script=None, usage=(100, 20)):
        self.script, self.usage = script or {}, usage
        self.asked = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def complete(self, messages):
        id = messages[-1]["content"].split()[-1]
        with self._lock:
            self.asked.append(id)
            outcomes = self.script.get(id, [])
            outcome = outcomes.pop(0) if outcomes else None
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.003)
        with self._lock:
            self.at_once -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return ChatReply(outcome or REPLY.format(id=id), "stop", *self.usage)


@pytest.fixture
def make_run(tmp_path):
    """Makes a run of `count` pairs of pictures in `tmp_path / name`."""
    rows = [{"img_id": str(number), "sentences": [f"It is number {number}"]} for number in range(30)]
    (tmp_path / "sd.json").write_text(json.dumps(rows))

    def make(count=None, name="run", **kwargs):
        dataset = "change.SpotTheDifference"
        return SyphusRun.create(tmp_path / name, dataset, tmp_path / "sd.json", "m", end=count, **kwargs)

    return make


def ask(run, model, budget=None, **kwargs):
    return run.ask(model, budget, **{"concurrency": 4, "first_pause": 0.001, **kwargs})


def test_annotations_at_an_address(make_run, tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    here = make_run(3)
    memory.pipe_file(f"{tmp_path}/sd.json", (tmp_path / "sd.json").read_bytes())
    there = SyphusRun.create(tmp_path / "2", "change.SpotTheDifference", f"memory:/{tmp_path}/sd.json", "m", end=3)
    assert list(there.queries()) == list(here.queries()) and not there.changes()
    memory.pipe_file(f"{tmp_path}/sd.json", b"[]")
    assert f"memory:/{tmp_path}/sd.json has changed since" in there.changes()


def test_two_that_make_one_run(make_run, tmp_path):
    """The queries of one would stand beside the settings of the other."""
    with claim(tmp_path / "run" / ".lock", "it"), pytest.raises(OSError, match="The run in .* is in use by process"):
        make_run(3)
    assert not (tmp_path / "run").exists()
    assert len(list(make_run(3).queries())) == 3


def test_all_are_asked_once_with_bounded_concurrency(make_run):
    run, model = make_run(), Model()
    summary = ask(run, model, Budget(prompt_price=2, completion_price=10))
    assert sorted(model.asked, key=int) == [str(n) for n in range(30)] and 1 < model.most_at_once <= 4
    assert (summary.queries, summary.replies, summary.pending, summary.requests) == (30, 30, 0, 30)
    assert (summary.prompt_tokens, summary.completion_tokens) == (3000, 600)
    assert summary.cost == pytest.approx((3000 * 2 + 600 * 10) / 1e6)
    meta = json.loads((run.folder / "meta.json").read_text())
    assert meta["total_tokens"] == 3600 and meta["valid_outputs"] == meta["total_examples"] == 30
    # nothing is left to ask
    assert ask(run, model).requests == 30 and len(model.asked) == 30


def test_failed_attempts_are_repeated_and_queries_given_up(make_run):
    busy, broken = TransientError("HTTP 429", 0.01), TransientError("HTTP 500")
    script = {"0": [busy, broken], "1": [broken] * 9, "2": [RejectedError("HTTP 400: too long")]}
    run, model = make_run(5), Model(script)
    summary = ask(run, model, max_attempts=3)
    counts = {id: model.asked.count(id) for id in "01234"}
    assert counts == {"0": 3, "1": 3, "2": 1, "3": 1, "4": 1}
    assert (summary.replies, summary.failed, summary.requests, summary.errors) == (3, 2, 9, 6)
    assert summary.reasons == {"HTTP 500": 1, "HTTP 400: too long": 1}
    # given up is given up, unless it is to be retried
    assert ask(run, model).requests == 9
    script["1"] = []
    summary = ask(run, model, retry_failed=True)
    assert (summary.replies, summary.failed, summary.requests) == (5, 0, 11)


@pytest.fixture
def pauses(monkeypatch):
    """What this thread would wait for, in seconds; no time passes. Threads of other tests wait as they did."""
    asked, wait, here = [], threading.Event.wait, threading.get_ident()

    def note(event, seconds=None):
        if threading.get_ident() != here:
            return wait(event, seconds)
        asked.append(seconds)
        return False

    monkeypatch.setattr(threading.Event, "wait", note)
    monkeypatch.setattr("otter_hf.production.syphus.run.ThreadPoolExecutor", OneThread)
    return asked


def test_pauses_double(make_run, monkeypatch, pauses):
    monkeypatch.setattr("otter_hf.production.syphus.run.random.uniform", lambda low, high: high)
    run = make_run(1)
    script = {"0": [TransientError("x"), TransientError("x"), TransientError("x", 7.0), TransientError("x")]}
    run.ask(Model(script), concurrency=1, first_pause=1.0)
    assert [pause for pause in pauses if pause in (1.0, 2.0, 4.0, 7.0, 8.0)] == [1.0, 2.0, 7.0, 4.0]


def test_an_endpoint_that_names_a_pause_holds_all_back(make_run, pauses):
    run = make_run(2)
    run.ask(Model({"0": [TransientError("busy", 70.0)]}), concurrency=1)
    # after the answer, in front of the second attempt, and in front of the next query: no time passes here
    assert [pause > 60 for pause in pauses] == [False, True, True, True]
    assert pauses[1] == 70.0


class OneThread:
    """Runs what is submitted at once, in place of a pool."""

    def __init__(self, size):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *args):
        work(*args)
        return self

    def result(self):
        pass


@pytest.mark.parametrize(
    "budget, requests",
    [
        (Budget(max_requests=7), 7),
        (Budget(max_requests=0), 0),
        # 120 tokens each: a sixth would pass the limit
        (Budget(max_tokens=700), 5),
        (Budget(max_cost=0.0005, prompt_price=1, completion_price=0), 5),
    ],
)
def test_budgets(make_run, budget, requests):
    run, model = make_run(), Model()
    summary = ask(run, model, budget, concurrency=1)
    assert summary.requests == len(model.asked) == requests and summary.stopped.startswith("budget: max_")
    # the budget is the run's, not the call's
    assert ask(run, model, budget).requests == requests
    assert ask(run, model).replies == 30 and len(model.asked) == 30


def test_a_budget_with_many_threads(make_run):
    run, model = make_run(), Model()
    summary = ask(run, model, Budget(max_tokens=1800), concurrency=4)
    # the first four are begun without knowing what they take
    assert 4 <= summary.requests <= 15 and summary.prompt_tokens + summary.completion_tokens <= 1800


def test_tokens_that_are_not_counted_are_estimated(make_run):
    run = make_run(1)
    summary = ask(run, Model(usage=(None, None)), Budget(max_cost=1, prompt_price=1e6))
    characters = sum(len(message["content"].encode()) for message in run.messages(next(run.queries())))
    assert characters / 4 <= summary.prompt_tokens <= characters / 4 + 10 and summary.cost == summary.prompt_tokens
    with run.journal() as journal:
        assert journal.reply("0")["estimated"] is True


def test_an_endpoint_that_refuses_everything_ends_the_run(make_run):
    run, model = make_run(), Model({"0": [EndpointError("The endpoint refuses all requests: HTTP 401.")]})
    with pytest.raises(EndpointError, match="HTTP 401"):
        ask(run, model, concurrency=1)
    summary = run.summary()
    assert (summary.requests, summary.failed, summary.pending, summary.lost) == (1, 0, 30, 0)
    model.script = {str(number): [RejectedError("no")] for number in range(30)}
    with pytest.raises(EndpointError, match="20 queries in a row failed, the last with: no"):
        ask(run, model, concurrency=1)
    assert ask(run, Model(), retry_failed=True).replies == 30


def test_an_error_of_ours_ends_the_run(make_run):
    class Broken(Model):
        def complete(self, messages):
            raise ZeroDivisionError

    run = make_run()
    with pytest.raises(ZeroDivisionError):
        ask(run, Broken())
    # what was under way is lost, and asked again
    summary = ask(run, Model())
    assert summary.replies == 30 and 1 <= summary.lost <= 4 and summary.requests == 30 + summary.lost


def test_shards_and_slices_are_disjoint_and_complete(make_run):
    ids = [[query.id for query in make_run(name=f"s{k}", shard=(k, 4)).queries()] for k in range(4)]
    assert sum(ids, []) == [str(n) for n in range(30)] and {len(part) for part in ids} == {7, 8}
    run = make_run(10, "slice", start=4, shard=(1, 2))
    assert [query.id for query in run.queries()] == ["7", "8", "9"]
    shuffled = [[query.id for query in make_run(name=f"r{i}", shuffle_seed=3).queries()] for i in range(2)]
    assert shuffled[0] == shuffled[1] != sorted(shuffled[0], key=int)


def test_a_run_does_not_need_its_annotations(make_run, tmp_path):
    run = make_run(3)
    (tmp_path / "sd.json").unlink()
    assert ask(SyphusRun(run.folder), Model()).replies == 3


def test_one_process_at_a_time(make_run):
    run = make_run(2)
    with run.writing(), pytest.raises(OSError, match="The run in .* is in use by process"):
        ask(run, Model())


def test_the_end_of_a_journal_may_be_cut_off(make_run):
    run = make_run(5)
    ask(run, Model(), Budget(max_requests=3), concurrency=1)
    path = run.folder / "journal.jsonl"
    content = path.read_bytes()
    last = content[: content.rstrip(b"\n").rindex(b"\n") + 1]
    path.write_bytes(content[:-10])  # the reply to the third
    assert (run.summary().replies, run.summary().lost) == (2, 1)
    assert path.read_bytes() == content[:-10]  # looking changes nothing
    model = Model()
    summary = ask(run, model)
    assert sorted(model.asked) == ["2", "3", "4"] and summary.replies == 5
    assert path.read_bytes().startswith(last)
    path.write_bytes(b"x\n" + content)
    with pytest.raises(ValueError, match="Line 1 of .* is no event: restore the file"):
        run.summary()
    (run.folder / "queries.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="Line 1 of .*queries.jsonl is no query: restore the file"):
        list(run.queries())
    for damaged in ("", "[]", "{}"):
        (run.folder / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json is damaged: restore it, or begin another run"):
            SyphusRun(run.folder)


def test_journal_replies_are_read_from_their_places(tmp_path):
    (tmp_path / "j").touch()
    with Journal(tmp_path / "j", writable=True) as journal:
        for id in ("ä", "b"):
            journal.append("sent", id, durable=False)
            journal.append("reply", id, text=f"{id}\n\ud800", prompt_tokens=1, completion_tokens=2, cost=0.5)
        assert journal.reply("ä")["text"] == "ä\n?" and journal.reply("c") is None
    with Journal(tmp_path / "j") as journal:
        assert journal.reply("b")["text"] == "b\n?" and (journal.cost, journal.counts["sent"]) == (1.0, 2)


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["video.Nothing"], "There is no dataset 'video.Nothing'"),
        (["change.SpotTheDifference", "--annotations", "gone"], "The annotations gone do not exist"),
        (["change.SpotTheDifference", "--prompt", "gone"], "There is no prompt file gone"),
        (["change.SpotTheDifference", "--slice-start", "99"], "No query of sd.json is selected"),
        (["change.SpotTheDifference", "--shard", "2/2"], "shard must be"),
        (["change.SpotTheDifference", "--shard", "x"], "--shard must be K/N"),
        (["change.SpotTheDifference", "--option", "temperature"], "--option must be KEY=JSON"),
        (["change.SpotTheDifference", "--base-url", "localhost:8000"], "base_url must begin with http:// or https://"),
        (["change.SpotTheDifference", "--max-cost", "1"], "max_cost=1.0 needs prompt_price and completion_price"),
        (["video.DenseCaptions", "--annotations", "twice.json"], "two records 'v': ids must be unique"),
    ],
)
def test_mistakes_end_in_one_sentence(make_run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"timestamps": [], "sentences": []})
    (tmp_path / "twice.json").write_text(f'{{"v": {row}, "v": {row}}}')
    given = ["--annotations", "sd.json"] if "--annotations" not in arguments else []
    assert main(["syphus", "run", *arguments, *given, "--model", "m", "--output", "bad", "--batch-files"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "bad" / "run.json").exists()


def test_a_run_is_not_written_over(make_run, tmp_path):
    make_run(1)
    with pytest.raises(FileExistsError, match="There is a run in .*: resume it, or choose another folder"):
        make_run(1)
    with pytest.raises(FileExistsError, match=r"another run in .* \(selection was .*\): choose another folder"):
        make_run(2)
    with pytest.raises(FileNotFoundError, match="There is no run in"):
        SyphusRun(tmp_path)


def test_annotations_that_changed_are_named(make_run, tmp_path, capsys):
    run = make_run(2)
    ask(run, Model())
    (tmp_path / "sd.json").write_text("[]")
    assert "sd.json has changed since" in run.changes()
    capsys.readouterr()
    assert main(["syphus", "resume", str(run.folder), "--batch-files"]) == 2
    error = capsys.readouterr().err
    assert "sd.json has changed since" in error and "--keep-queries" in error and error.count("\n") == 1
    assert main(["syphus", "resume", str(run.folder), "--batch-files", "--keep-queries"]) == 0
    assert main(["syphus", "build", str(run.folder), "--output", str(tmp_path / "out"), "--name", "B"]) == 0
    assert "sd.json has changed since" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="sd.json has changed since"):
        make_run(2)
