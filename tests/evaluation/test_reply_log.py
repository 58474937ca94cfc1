"""Replies on disk, and the judge."""

import numpy as np
import pytest
from benchmark_rows import BLUE, RED, endpoint

from otter_hf.evaluation.judge import Judge
from otter_hf.evaluation.replies import ReplyLog, answer_all


def test_replies_are_found_again_by_words_and_pixels(tmp_path):
    log = ReplyLog(tmp_path, context={"path": "a"})
    question = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "?"}]}]
    log.add({log.key(question): "red"})
    again = ReplyLog(tmp_path, rank=1, context={"path": "a"})
    assert again.get(again.key(question)) == "red"
    question[0]["content"][0]["image"] = BLUE
    assert again.get(again.key(question)) is None
    question[0]["content"][0]["image"] = RED.copy()
    assert again.get(again.key(question)) == "red"
    # of large arrays the text is the same
    frames = np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8)
    frames[1][0, 32] = 255
    assert str(frames[0]) == str(frames[1]) and log.key(frames[0]) != log.key(frames[1])
    other = ReplyLog(tmp_path, rank=2, context={"path": "b"})
    assert other.get(other.key(question)) is None


@pytest.mark.parametrize("cut", [b'{"key": "second", "rep', '{"key": "second", "reply": "\u6c34'.encode()[:-1]])
def test_a_line_cut_off_by_a_kill_is_skipped_and_ended(tmp_path, cut):
    """Also in the middle of a character."""
    log = ReplyLog(tmp_path)
    log.add({"first": "1"})
    log.close()
    with (tmp_path / "replies-0.jsonl").open("ab") as file:
        file.write(cut)
    log = ReplyLog(tmp_path)
    assert log.get("second") is None
    log.add({"third": [1.5, 2]})
    log.close()
    again = ReplyLog(tmp_path)
    assert again.get("first") == "1" and again.get("third") == [1.5, 2]


def test_a_reply_may_hold_any_character(tmp_path):
    """Those that end a line elsewhere, and half a surrogate pair, which JSON can spell."""
    ReplyLog(tmp_path).add({"a": "one\u2028two\x85three\x0cfour\nfive", "b": "\ud83d"})
    again = ReplyLog(tmp_path)
    assert again.get("a") == "one\u2028two\x85three\x0cfour\nfive" and again.get("b") == "?"


def test_the_same_question_again_has_a_reply_of_its_own(tmp_path):
    """In one window and in others, also when the first ones are known."""
    asked = []

    def ask(window, wanted):
        asked.extend(wanted)
        yield {number: f"{window[number]} {len(asked)} {number}" for number in wanted}

    def answers(items):
        return list(answer_all(items, str, ask, 2, ReplyLog(tmp_path), disable=True))

    first = answers("aab")
    assert len(set(first)) == 3 and answers("aab") == first and len(asked) == 3
    more = answers("aabaa")
    assert more[:3] == first and len(set(more)) == 5 and len(asked) == 5


def test_the_judge_keeps_replies_and_says_when_there_is_none(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the openai client is not installed (docs/evaluation.md)")
    said = {"good": "Yes.", "bad": 500}
    with endpoint(lambda text: said[text]) as (address, requests):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        judge = Judge("name", ReplyLog(tmp_path), max_retries=0)
        assert [judge.ask([{"role": "user", "content": "good"}]) for _ in range(2)] == ["Yes.", "Yes."]
        assert len(requests) == 1 and requests[0]["model"] == "name" and requests[0]["temperature"] == 0.0
        assert judge.ask([{"role": "user", "content": "good"}], run=1) == "Yes." and len(requests) == 2
        assert judge.ask([{"role": "user", "content": "bad"}]) is None
        said["bad"] = "No"
        assert judge.ask([{"role": "user", "content": "bad"}]) == "No"


def test_a_judge_without_a_key_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        Judge("name")
