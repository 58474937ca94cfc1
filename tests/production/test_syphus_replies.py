"""Replies of language models to pairs, and what becomes of what is none."""

import json

import pytest

from otter_hf.production.syphus import FilterRules
from otter_hf.production.syphus.filters import FORBIDDEN
from otter_hf.production.syphus.queries import Query
from otter_hf.production.syphus.replies import (
    Pair,
    parse_conversations,
    parse_expansions,
    parse_options,
    parse_pairs,
    tolerant_json,
)
from otter_hf.production.syphus.translate import parse_translation


JSON_PAIRS = [{"question": "Q1?", "answer": "A1"}, {"Question": "Q2?", "Answer": "A2: b"}]


@pytest.mark.parametrize(
    "reply, pairs",
    [
        ("Question: Q1?\nAnswer: A1\n\nQuestion: Q2?\nAnswer: A2", [("Q1?", "A1"), ("Q2?", "A2")]),
        # no empty line between pairs, as the in-context examples are written
        ("Question: Q1?\nAnswer: A1\nQuestion: Q2?\nAnswer: A2\n", [("Q1?", "A1"), ("Q2?", "A2")]),
        ("Question: What: this?\nAnswer: Two: a and b: c", [("What: this?", "Two: a and b: c")]),
        ("question: Q1?\nANSWER: first\n\n- second\n  third\n", [("Q1?", "first\n\n- second\n  third")]),
        ("Sure! Here they are:\n\n1. **Question:** Q1?\n   **Answer:** A1\n\n---\n", [("Q1?", "A1")]),
        ("Question 1: Q1?\nAnswer 1: A1\n\n2. Question 2: Q2?\nAnswer 2: A2", [("Q1?", "A1"), ("Q2?", "A2")]),
        ("* Question: Q1?\n* Answer: A1\r\n* Question: Q2?\n* Answer: A2", [("Q1?", "A1"), ("Q2?", "A2")]),
        ("Q: Q1?\nA: A1\nQ: Q2?\nA: A2", [("Q1?", "A1"), ("Q2?", "A2")]),
        ("1.\nQuestion: Q1?\nAnswer: A1\n2.\nQuestion: Q2?\nAnswer: A2", [("Q1?", "A1"), ("Q2?", "A2")]),
        ("Question：什么？\nAnswer：一只狗。", [("什么？", "一只狗。")]),
        (json.dumps(JSON_PAIRS), [("Q1?", "A1"), ("Q2?", "A2: b")]),
        ("Here are the pairs:\n\n" + json.dumps(JSON_PAIRS, indent=1), [("Q1?", "A1"), ("Q2?", "A2: b")]),
        ('[{"question": "Q1?", "answer": "A1, ]",}, {"q": "Q2?", "a": 2},]', [("Q1?", "A1, ]"), ("Q2?", "2")]),
        (
            json.dumps({"tags": [], "easy": JSON_PAIRS[:1], "more": {"hard": JSON_PAIRS[1:]}}),
            [("Q1?", "A1"), ("Q2?", "A2: b")],
        ),
        (json.dumps({**JSON_PAIRS[0], "boxes": [{"x": 1}]}), [("Q1?", "A1")]),
        ("```json\n" + json.dumps({"pairs": JSON_PAIRS}, indent=2) + "\n```", [("Q1?", "A1"), ("Q2?", "A2: b")]),
    ],
)
def test_pairs(reply, pairs):
    parsed = parse_pairs(reply)
    assert [(pair.question, pair.answer) for pair in parsed.pairs] == pairs
    assert parsed.invalid == []


@pytest.mark.parametrize(
    "reply, pairs, reasons",
    [
        ("", [], ["the reply is empty"]),
        ("I cannot do that.", [], ["there is no question and no answer in it"]),
        ("Question: Q1?\nQuestion: Q2?\nAnswer: A2", [("Q2?", "A2")], ["there is no answer to it"]),
        ("Answer: A0\nQuestion: Q1?\nAnswer: A1", [("Q1?", "A1")], ["there is no question in front of it"]),
        ("Question: Q1?\nAnswer: A1\nAnswer: more", [("Q1?", "A1")], ["there is no question in front of it"]),
        ("Question: Q1?\nAnswer: A1\nQuestion: Q2?", [("Q1?", "A1")], ["there is no answer to it"]),
        ("Question: Q1?\nAnswer:\nQuestion:\nAnswer: x", [], ["empty answer", "empty question"]),
        ('[{"question": "Q1?", "answer": "A1"}, {"question": "Q2', [("Q1?", "A1")], ["it is no complete JSON object"]),
        ('{"pairs": [{"question": "Q1?", "answer": "A1"}, {"que', [("Q1?", "A1")], ["it is no complete JSON object"]),
        ('[{"question": "Q1?"}, {"question": "Q2?", "answer": "A2"}]', [("Q2?", "A2")], ["it has no question and"]),
        ("[]", [], ["there is no object in it"]),
    ],
)
def test_pieces_without_use_are_kept_with_the_reason(reply, pairs, reasons):
    parsed = parse_pairs(reply)
    assert [(pair.question, pair.answer) for pair in parsed.pairs] == pairs
    assert len(parsed.invalid) == len(reasons)
    for invalid, reason in zip(parsed.invalid, reasons, strict=True):
        assert invalid.reason.startswith(reason)


def test_parsers_survive_anything():
    query = Query("x", "y", instruction="i")
    broken = '{"a": [1, {"b": {}}, "Question: \\n'
    for reply in ("[" * 5000, "{" * 3000, '{"a":' * 3000, broken, "Options 3: \nAnswer: x", "Conversation 1\n", "\0"):
        for parse in PARSERS:
            parsed = parse(reply, query)
            assert not parsed.pairs and parsed.invalid


PARSERS = (parse_pairs, parse_options, parse_conversations, parse_expansions)
LINES = ["Question: Q?", "Answer: A", "Options 1: x", "Options 2: y", "Answer: 2", "Conversation 1 - N", "Human: H?"]
LINES += ["Assistant: A.", "reason: r", "CH2Eng Translation: t", "Expansion_with_Eng_1: e", "", '{"question": "Q?",']
LINES += [
    '"answer": "A"}',
    "[",
    "]",
    "**Question:** Q?",
    "1. Question 1: Q?",
    "```json",
    "```",
    "Question:",
    "Answer:",
]


def test_parsers_survive_any_order_of_lines():
    hypothesis = pytest.importorskip("hypothesis")
    text = hypothesis.strategies.text(max_size=12)
    lines = hypothesis.strategies.lists(hypothesis.strategies.sampled_from(LINES) | text, max_size=12)

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
    @hypothesis.given(lines)
    def check(lines):
        for parse in PARSERS:
            parsed = parse("\n".join(lines), Query("x", "y", instruction="i"))
            # nothing is lost without a reason, and no half of a pair is used
            assert parsed.pairs or parsed.invalid
            assert all(pair.question.strip() and pair.answer.strip() for pair in parsed.pairs)

    check()


OPTIONS = "Question: Which?\nOptions 1: red\nOptions 2: blue\n{}Answer: {}\n"


@pytest.mark.parametrize("answer", ["2", "2. blue", "Options 2", "blue", "(2)"])
def test_options(answer):
    parsed = parse_options(OPTIONS.format("", answer) + "Question: And?\nOption 1: a\nOption 2: b\nAnswer: 1")
    assert parsed.pairs == [Pair("Which?\n1. red\n2. blue", "2. blue"), Pair("And?\n1. a\n2. b", "1. a")]
    assert not parsed.invalid


@pytest.mark.parametrize(
    "reply, reason",
    [
        (OPTIONS.format("", "3"), "the answer '3' is none of the 2 options"),
        (OPTIONS.format("Options 3:\n", "1"), "2 options, at least 2 are needed"),
        (OPTIONS.format("Answer: 1\n", "1"), "2 answers in place of one"),
        ("Question: Which?\nOptions 1: red\nAnswer: 1", "1 options, at least 2"),
        ("Options 1: red\nOptions 2: blue\nAnswer: 1", "there is no question in front of it"),
        ("no", "there is no question in it"),
    ],
)
def test_options_without_use(reply, reason):
    parsed = parse_options(reply)
    assert not parsed.pairs and parsed.invalid[0].reason.startswith(reason)


def test_conversations():
    parsed = parse_conversations(
        "Conversation 1 - Take a nap (nurse)\nreason: There is a bed.\nHuman: Where?\nAssistant: On the bed.\n"
        "Human: And then?\nAssistant: Sleep: well.\n\n**Conversation 2 - Read**\nHuman: Light?\nAssistant: A lamp.\n"
        "reason: XXX\nHuman: More?\nHuman: Still?\nAssistant: Yes.\nConversation 3 - Empty\n"
    )
    assert parsed.pairs == [
        Pair("Where?", "On the bed.", 0),
        Pair("And then?", "Sleep: well.", 0),
        Pair("Light?", "A lamp.", 1),
    ]
    reasons = [invalid.reason for invalid in parsed.invalid]
    assert reasons == ["the rounds do not alternate from here on", "there are no rounds in it"]


def test_expansions_answer_the_instruction_of_the_annotation():
    query = Query("x", "y", instruction="Why?")
    reply = "CH2Eng Translation: Because.\nExpansion_with_Eng_1: As: so.\nExpansion_with_Eng_2:"
    parsed = parse_expansions(reply, query)
    assert parsed.pairs == [Pair("Why?", "Because."), Pair("Why?", "As: so.")]
    assert parsed.invalid[0].reason == "there is no text behind it"
    assert parse_expansions("no", query).invalid[0].reason == "there is no translation in it"


def test_translations():
    good = '{"a": {"de": "Was?", "zh": "什么？"}, "b": {"de": "Ein Hund,\n}", "zh": "狗"}}'
    assert parse_translation(good, "zh") == ("什么？", "狗")
    # commas behind the last member, as models write them; those in texts stay
    reply = 'Here you are:\n```json\n{"a": {"de": "Was,}?",}, "b": {"de": "A \\"x\\",]",},}\n```\nBye {}'
    assert parse_translation(reply, "de") == ("Was,}?", 'A "x",]')
    with pytest.raises(ValueError, match="there is no fr in 'a'"):
        parse_translation(good, "fr")
    with pytest.raises(ValueError, match="its JSON is broken"):
        parse_translation(good[:40], "de")
    with pytest.raises(ValueError, match="no JSON object"):
        tolerant_json("no")


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("Who?", "A dog.", None),
        ("What?", "As an AI language model, I have no eyes.", "forbidden words"),
        ("What?", "I'm sorry, but no.", "forbidden words"),
        ("What does the provided caption say?", "A dog.", "forbidden words"),
        ("Why?", "According to the timestamps, later.", "forbidden words"),
        ("xxx", "XXX", "forbidden words"),
        ("What?", "word " * 301, "more than 300 words"),
        ("what", "a DOG", "repeated pair"),
        ("What?", "A cat.", None),
    ],
)
def test_rules(question, answer, reason):
    seen: set[str] = set()
    assert FilterRules().reason_to_drop(Pair("What?", "A dog."), seen) is None
    assert FilterRules().reason_to_drop(Pair(question, answer), seen) == reason
    if reason == "repeated pair":
        assert FilterRules(drop_repeated=False).reason_to_drop(Pair(question, answer), seen) is None


def test_rules_are_checked():
    assert FilterRules(forbidden=("dog",)).reason_to_drop(Pair("a", "Dogs"), set()) == "forbidden words"
    with pytest.raises(ValueError, match="expression '\\(' is broken"):
        FilterRules(forbidden=(*FORBIDDEN, "("))
    with pytest.raises(ValueError, match="max_words must be at least 1"):
        FilterRules(max_words=0)
