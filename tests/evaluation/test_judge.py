"""What a judge's endpoint may refuse."""

import json

import pytest
from benchmark_rows import endpoint

from otter_hf.evaluation.benchmarks import Options, mmvet_record
from otter_hf.evaluation.judge import Judge
from otter_hf.evaluation.replies import ReplyLog
from otter_hf.thinking import strip_thinking, thinking_length


pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "yes or no?"}]


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """A judge of an endpoint that answers by a function of the request."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    servers = []

    def start(reply, **kwargs):
        server = endpoint(reply)
        address, requests = server.__enter__()
        servers.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        return Judge("the-judge", ReplyLog(tmp_path / "judge"), max_retries=0, **kwargs), requests

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def refusing(*names):
    """What endpoints of reasoning models say to the first option of `names` that they get."""

    def reply(text, body):
        for name in names:
            if name in body:
                code = "unsupported_parameter" if name == "max_tokens" else "unsupported_value"
                return 400, {"error": {"message": f"{name}: no", "code": code, "param": name}}
        return 200, "<think>No? Yes.</think>yes"

    return reply


def test_an_option_that_the_endpoint_does_not_know_is_left_out(judge, tmp_path):
    one, requests = judge(refusing("max_tokens", "temperature"), options={"reasoning_effort": "low"})
    assert one.ask(QUESTION, max_tokens=3) == "yes" and len(requests) == 3
    assert requests[-1].keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert requests[-1]["max_completion_tokens"] > 1000  # room for its thoughts
    assert one.ask(QUESTION, run=1) == "yes" and len(requests) == 4  # it is known by now
    assert one.ask(QUESTION, max_tokens=3) == "yes" and len(requests) == 4  # and so is the reply
    (line, _) = (tmp_path / "judge" / "replies-0.jsonl").read_text().splitlines()
    assert json.loads(line)["reply"].startswith("<think>")


def test_an_option_of_none_is_not_sent_and_other_refusals_are_failures(judge):
    one, requests = judge(lambda text, body: (200, "no"), options={"temperature": None})
    assert one.ask(QUESTION) == "no" and "temperature" not in requests[0]
    one, requests = judge(refusing("messages"))
    assert one.ask(QUESTION) is None and len(requests) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_judge_that_refuses_all_is_asked_once(judge, status):
    one, requests = judge(lambda text, body: (status, {"error": {"message": "no such key"}}))
    assert one.ask(QUESTION) is None and one.ask(QUESTION, run=1) is None and len(requests) == 1


def test_an_empty_reply_of_a_judge_is_none_and_is_asked_again(judge):
    one, requests = judge(lambda text, body: (200, "<think>hm"))
    assert one.ask(QUESTION) is None and one.ask(QUESTION) is None and len(requests) == 2


def test_mmvet_asks_what_its_authors_ask(judge):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")
    one, requests = judge(lambda text, body: (200, "0.5" if text.endswith("(digit): ") else "good"))
    row = {"id": "v0", "question": "How many?", "answer": "2<AND>3", "capability": "rec,math"}
    assert mmvet_record(row, ["<think>4?</think>two"], Options(judge=one))["grades"] == [0.5]
    table, last = requests[0]["messages"][0]["content"].split("\n\nHow many? | ")
    assert last == "2 <AND> 3 | two | "
    import hashlib

    # the table of mm-vet_evaluator.py, yuweihao/MM-Vet 7d717c2
    digest = hashlib.sha256(f"{table}\n".encode()).hexdigest()
    assert digest == "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
    assert [request["temperature"] for request in requests] == [0.0, 0.0]
    # nothing to grade
    assert mmvet_record(row, [""], Options(judge=one))["grades"] == [0.0] and len(requests) == 2


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("B", "B"),
        ("<think>A?\n\nB?</think>\n\nB", "B"),
        ("opened by the template</think>B", "B"),
        ("<think>never ends", ""),
        ("<THINKING level=2>a</THINKING> B", "B"),
        ("<think>a<think>b</think>c</think>B", "B"),
        ("[THINK]a[/THINK]B", "B"),
        ("◁think▷a◁/think▷B", "B"),
        ("<think>a</think><answer>B</answer>", "B"),
        ("I think B", "I think B"),
        ("a < b, thinking > 2", "a < b, thinking > 2"),
    ],
)
def test_thoughts_are_left_out(reply, answer):
    assert strip_thinking(reply) == answer == strip_thinking(answer)
    assert strip_thinking(reply[thinking_length(reply) :]) == answer
