"""Runs: budgets, attempts, resuming."""

import json
import threading

import pytest
from syphus_model import Model, ask

from otter_hf.cli import main
from otter_hf.files import claim
from otter_hf.production.syphus import Budget, SyphusRun
from otter_hf.production.syphus.client import EndpointError, RejectedError, TransientError
from otter_hf.production.syphus.journal import Journal


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
        (["change.SpotTheDifference", "--option", "n=3"], "The option n cannot be 3, as a run asks its model for one"),
        (["change.SpotTheDifference", "--option", "stream=true"], "The option stream cannot be True"),
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
