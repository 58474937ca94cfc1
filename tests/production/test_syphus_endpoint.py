"""Syphus against HTTP endpoints of all tempers, through the openai package."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from otter_hf.cli import main
from otter_hf.data.mixture import MixtureEntry
from otter_hf.data.validate import check_mixture
from otter_hf.production.syphus import Budget, ChatClient, SyphusRun
from otter_hf.production.syphus.client import EndpointError, RejectedError, TransientError, read_completion


pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="openai is not installed")


class Endpoint:
    """Chat completions of 100 + 20 tokens; `tempers` says how an id is answered, one temper per attempt."""

    def __init__(self, tempers=None, delay=0.0, slow=1.0):
        self.tempers, self.delay, self.slow = tempers or {}, delay, slow
        self.requests = []
        self._lock = threading.Lock()

    def __call__(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        id = body["messages"][-1]["content"].split()[-1]
        with self._lock:
            self.requests.append((id, body, request.path, request.headers.get("Authorization")))
            temper = self.tempers[id].pop(0) if self.tempers.get(id) else "well"
        time.sleep(self.slow if temper == "slowly" else self.delay)
        status, headers, text = self._answer(temper, id)
        data = text.encode()
        with suppress(OSError):  # who asked is gone
            request.send_response(status)
            for key, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data)

    @staticmethod
    def _answer(temper, id):
        if isinstance(temper, int):
            headers = {"Retry-After": "0.05"} if temper == 429 else {}
            return temper, headers, json.dumps({"error": {"message": f"this is {temper}"}})
        if temper == "no credit":
            return 429, {}, json.dumps({"error": {"message": "pay first", "code": "insufficient_quota"}})
        if temper == "other options":
            told = {"message": "Unsupported parameter: 'max_tokens'.", "code": "unsupported_parameter"}
            return 400, {}, json.dumps({"error": told})
        message = {"role": "assistant", "content": f"Question: Q of {id}?\nAnswer: A of {id}."}
        if temper == "nonsense":
            message["content"] = "I would rather talk about the weather."
        if temper == "in JSON that breaks off":
            message["content"] = '[{"question": "Q1?", "answer": "A1"}, {"question": "Q2?", "ans'
        if temper == "in parts":
            message["content"] = [{"type": "text", "text": message["content"]}]
        if temper == "empty":
            message["content"] = " "
        if temper == "no content at length":
            message |= {"content": None, "reasoning_content": "long thoughts"}
        if temper == "only a thought":
            message["content"] = "<think>Question: A draft?"
        if temper == "with a thought":
            message["content"] = f"<think>Question: A draft?\nAnswer: Wrong.\n</think>\n{message['content']}"
        finish = "length" if temper in ("at length", "no content at length", "only a thought") else "stop"
        finish = "content_filter" if temper == "filtered" else finish
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": finish, "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        text = json.dumps(body)
        if temper == "truncated body":
            return 200, {}, text[:100]
        if temper == "a web page":
            return 200, {"Content-Type": "text/html"}, "<html>busy</html>"
        if temper == "no choices":
            return 200, {}, json.dumps({**body, "choices": []})
        if temper == "broken connection":
            return 200, {"Content-Length": str(len(text) + 50)}, text
        return 200, {}, text


@pytest.fixture
def annotations(tmp_path):
    rows = [{"img_id": str(number), "sentences": [f"It is number {number}"]} for number in range(40)]
    (tmp_path / "sd.json").write_text(json.dumps(rows))
    return tmp_path / "sd.json"


def make_run(annotations, url, count=None, **kwargs):
    dataset = "change.SpotTheDifference"
    return SyphusRun.create(annotations.parent / "run", dataset, annotations, "m", base_url=url, end=count, **kwargs)


def test_what_is_sent(serve, annotations, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint()
    with serve(endpoint) as url:
        run = make_run(annotations, f"{url}/v1", 1, options={"temperature": 0, "top_p": None, "top_k": 5})
        reply = run.client(api_key="secret").complete(run.messages(next(run.queries())))
    assert (reply.text, reply.finish_reason) == ("Question: Q of 0?\nAnswer: A of 0.", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 20)
    ((_, body, path, key),) = endpoint.requests
    messages = body.pop("messages")
    assert body == {"model": "m", "temperature": 0, "max_tokens": 3200, "top_k": 5}
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert not any("secret" in path.read_text() for path in run.folder.iterdir())


@pytest.mark.parametrize(
    "temper, error, message",
    [
        (429, TransientError, "HTTP 429: this is 429"),
        (500, TransientError, "HTTP 500"),
        (503, TransientError, "HTTP 503"),
        (408, TransientError, "HTTP 408"),
        ("slowly", TransientError, "no answer in time"),
        ("truncated body", TransientError, "the body is no chat completion"),
        ("a web page", TransientError, "the body is no chat completion"),
        ("no choices", TransientError, "the body is no chat completion"),
        ("broken connection", TransientError, "connection failed"),
        (400, RejectedError, "HTTP 400"),
        (422, RejectedError, "HTTP 422"),
        (403, RejectedError, "HTTP 403"),
        ("empty", RejectedError, "^empty reply$"),
        ("no content at length", RejectedError, "empty reply at the limit of tokens"),
        ("only a thought", RejectedError, "empty reply at the limit of tokens"),
        ("filtered", RejectedError, "stopped by a content filter"),
        (401, EndpointError, "refuses all requests: HTTP 401"),
        (402, EndpointError, "refuses all requests: HTTP 402"),
        (404, EndpointError, "refuses all requests: HTTP 404"),
        ("no credit", EndpointError, "refuses all requests: HTTP 429: pay first"),
        ("other options", EndpointError, "Unsupported parameter: 'max_tokens'; an option of null is not sent"),
    ],
)
def test_failures_of_an_endpoint(serve, temper, error, message):
    endpoint = Endpoint({"0": [temper]})
    with serve(endpoint) as url, pytest.raises(error, match=message) as caught:
        timeout = 0.3 if temper == "slowly" else 30
        ChatClient("m", f"{url}/v1", timeout=timeout).complete([{"role": "user", "content": "it is 0"}])
    assert len(endpoint.requests) == 1  # attempts are ours to count
    if temper == 429:
        assert caught.value.retry_after == 0.05


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base_url": "localhost:8000/v1"}, "base_url must begin with http:// or https://, got 'localhost:8000/v1'"),
        ({"timeout": 0}, "timeout must be a number of seconds, got 0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_asked(settings, message):
    with pytest.raises(ValueError, match=message):
        ChatClient("m", **settings)


def test_nobody_answers():
    with pytest.raises(TransientError, match="connection failed"):
        ChatClient("m", "http://127.0.0.1:9/v1", timeout=5).complete([{"role": "user", "content": "x"}])


def test_a_run_against_an_endpoint_of_all_tempers(serve, annotations):
    tempers = {
        "1": [429, 429],
        "2": [500, 503],
        "3": ["slowly"],
        "4": ["truncated body", "a web page", "no choices"],
        "5": ["broken connection"],
        "6": [400],
        "7": ["nonsense"],
        "8": ["in JSON that breaks off"],
        "9": [500] * 9,
        "10": ["at length"],
    }
    # one each and four for 9, and those that fail in passing
    expected = 40 + 3 + 2 + 2 + 1 + 3 + 1
    endpoint = Endpoint(tempers, slow=4)
    with serve(endpoint) as url:
        run = make_run(annotations, f"{url}/v1")
        summary = run.ask(
            run.client(timeout=3),
            Budget(prompt_price=1, completion_price=2),
            concurrency=8,
            max_attempts=4,
            first_pause=0.01,
        )
    assert len(endpoint.requests) == summary.requests == expected
    assert (summary.replies, summary.failed, summary.pending) == (38, 2, 0)
    assert summary.reasons == {"HTTP 400: this is 400": 1, "HTTP 500: this is 500": 1}
    assert (summary.prompt_tokens, summary.completion_tokens) == (3800, 760)
    assert summary.cost == pytest.approx((3800 + 2 * 760) / 1e6)
    out = annotations.parent / "out"
    assert main(["syphus", "build", str(run.folder), "--output", str(out), "--name", "S"]) == 0
    invalid = [json.loads(line) for line in (out / "S_invalid.jsonl").read_text().splitlines()]
    assert {line["id"]: line["error_message"] for line in invalid} == {
        "6": "not answered: HTTP 400: this is 400",
        "7": "there is no question and no answer in it",
        "8": "it is no complete JSON object",
        "9": "not answered: HTTP 500: this is 500",
        "10": "cut off at the limit of tokens",
    }
    assert invalid[1]["response"] == "I would rather talk about the weather."
    report = json.loads((out / "S_build.json").read_text())
    # 40 queries but 6, 7, 9 and 10, which has one pair, with the one of 8 that is whole
    assert (report["records"], report["replies"]) == (36, 38)
    entry = MixtureEntry("TEXT_ONLY", "S", str(out / "S_instructions.json"), (), str(out / "S_train.json"))
    assert check_mixture([entry]).ok(strict=True)


def journal_lines(folder):
    path = folder / "journal.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def replied(folder):
    events = []
    for line in journal_lines(folder):
        with suppress(ValueError):  # what is being written
            events.append(json.loads(line))
    return [event["id"] for event in events if event["event"] == "reply"]


@pytest.mark.slow
def test_nothing_is_asked_twice_after_kills(serve, annotations, capsys):
    endpoint, folder = Endpoint(delay=0.1), annotations.parent / "run"
    with serve(endpoint) as url:
        arguments = ["--base-url", f"{url}/v1", "--concurrency", "4"]
        source = ["change.SpotTheDifference", "--annotations", str(annotations), "--model", "m", "--output"]
        command = ["run", *source, str(folder)]
        kills = []
        for goal in (6, 16):
            process = subprocess.Popen([sys.executable, "-m", "otter_hf.cli", "syphus", *command, *arguments])
            while len(replied(folder)) < goal:
                assert process.poll() is None
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills.append((len(endpoint.requests), replied(folder)))
            command = ["resume", str(folder)]
        with open(folder / "journal.jsonl", "ab") as file:
            file.write(b'{"event": "reply", "id": "39", "te')  # as a kill may leave it
        assert 6 <= len(kills[0][1]) < len(kills[1][1]) < 40
        prices = ["--prompt-price", "1", "--completion-price", "2"]
        assert main(["syphus", "resume", str(folder), *arguments, *prices]) == 0
    ids = [id for id, *_ in endpoint.requests]
    assert len(set(ids)) == 40
    for number, known in kills:
        assert not set(known) & set(ids[number:])
    summary = SyphusRun(folder).summary()
    assert summary.replies == 40 and summary.requests == 40 + summary.lost
    # as many as were under way; a kill may come between the entry in the journal and the request
    assert summary.lost <= 2 * 4 and len(ids) <= summary.requests
    assert (summary.prompt_tokens, summary.completion_tokens) == (4000, 800)
    assert "40 of 40 queries answered, 0 failed" in capsys.readouterr().out
    assert json.loads((folder / "meta.json").read_text())["lost_requests"] == summary.lost


def test_a_cold_start(serve, annotations, tmp_path, capsys):
    with serve(Endpoint()) as url:
        source = ["--annotations", str(annotations), "--model", "m", "--base-url", f"{url}/v1"]
        short = ["--slice-end", "2", "--no-in-context", "--output", str(tmp_path / "cold")]
        assert main(["syphus", "run", "change.SpotTheDifference", *source, *short]) == 0
        draft = str(tmp_path / "prompt.json")
        assert main(["syphus", "cold-start", str(tmp_path / "cold"), "--output", draft]) == 0
        turns = json.loads(Path(draft).read_text())["in_context"]
        assert turns[0] == {"role": "user", "content": "It is number 0"}
        assert turns[1] == {"role": "assistant", "content": [{"Question": "Q of 0?", "Answer": "A of 0."}]}
        real = ["--prompt", draft, "--slice-end", "3", "--output", str(tmp_path / "real")]
        assert main(["syphus", "run", "change.SpotTheDifference", *source, *real]) == 0
    assert len(SyphusRun(tmp_path / "real").prompt.in_context) == 2
    assert "2 examples in" in capsys.readouterr().out


def test_replies_without_answer_cost_and_can_be_asked_again(serve, annotations, capsys):
    tempers = {"1": ["empty"], "2": ["filtered"], "3": [403], "4": ["in parts"], "5": ["with a thought"]}
    with serve(Endpoint(tempers)) as url:
        run = make_run(annotations, f"{url}/v1", 6)
        summary = run.ask(run.client(), concurrency=1)
        assert (summary.replies, summary.failed, summary.pending) == (3, 3, 0)
        assert set(summary.reasons) == {"empty reply", "stopped by a content filter", "HTTP 403: this is 403"}
        # what the endpoint charged for counts, as in a call of its own
        assert (summary.prompt_tokens, summary.completion_tokens) == (500, 100)
        assert SyphusRun(run.folder).summary().prompt_tokens == 500
        assert run.ask(run.client()).replies == 3  # what was given up is left alone
        assert run.ask(run.client(), retry_failed=True).replies == 6
    assert main(["syphus", "build", str(run.folder), "--output", str(annotations.parent / "made")]) == 0
    records = json.loads((annotations.parent / "made" / "SD_instructions.json").read_text())["data"].values()
    assert [record["instruction"] for record in records] == [f"Q of {number}?" for number in range(6)]


def test_results_of_a_batch_without_answer(annotations, tmp_path):
    from otter_hf.production.syphus.batch import read_batch_results, write_batch_files

    run = make_run(annotations, None, 3)
    (path,) = write_batch_files(run)
    ids = [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    choices = [
        {"finish_reason": "stop", "message": {"content": "Question: a?\nAnswer: b."}},
        {"finish_reason": "length", "message": {"content": None, "reasoning_content": "long"}},
        {"finish_reason": "content_filter", "message": {"content": "Question: c?"}},
    ]
    results = [
        {"custom_id": id, "response": {"status_code": 200, "body": {"choices": [choice], "usage": usage}}}
        for id, choice in zip(ids, choices, strict=True)
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, results)))
    summary, new = read_batch_results(run, [tmp_path / "results.jsonl"])
    assert (summary.replies, summary.failed, new, summary.prompt_tokens) == (1, 2, 3, 300)
    assert set(summary.reasons) == {"empty reply at the limit of tokens", "stopped by a content filter"}
    odd = {"custom_id": ids[1], "response": "gateway error", "error": {"code": "x", "message": "try again"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(odd))
    summary, new = read_batch_results(run, [tmp_path / "results.jsonl"])
    assert new == 1 and any("try again" in reason for reason in summary.reasons)


def test_an_unfinished_run_has_a_status_of_its_own(serve, annotations, capsys):
    with serve(Endpoint({"0": [401]})) as url:
        source = ["--annotations", str(annotations), "--model", "m", "--base-url", f"{url}/v1", "--concurrency", "1"]
        arguments = ["change.SpotTheDifference", *source, "--output", str(annotations.parent / "run")]
        assert main(["syphus", "run", *arguments]) == 2
        assert "The endpoint refuses all requests: HTTP 401" in capsys.readouterr().err
        assert main(["syphus", "resume", str(annotations.parent / "run"), "--max-requests", "3"]) == 1
    output = capsys.readouterr().out
    assert "2 of 40 queries answered, 0 failed, 0 in a batch, 38 to ask" in output
    assert "stopped: budget: max_requests=3" in output


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": ["a", {"type": "text", "text": "b"}, {"type": "text", "text": None}]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": "x"}, {"text": "b"}]}, "b"),
        ({"content": None}, RejectedError),
        (None, RejectedError),
        ({"content": {"text": "b"}}, TransientError),
    ],
)
def test_messages_as_endpoints_write_them(message, expected):
    body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    if isinstance(expected, str):
        assert read_completion(body).text == expected
    else:
        with pytest.raises(expected):
            read_completion(body)
