"""MagnifierBench (OtterHD, arXiv:2311.04219): small objects, by multiple choice and in free form."""

import re
from collections.abc import Mapping

from . import percent
from .choices import OTHER, parse_choice
from .replies import is_answered, read_reply


LETTERS = "ABCD"
# of letters that a question holds, too, the last ones in order
_LISTED = re.compile(r"(.*(?:^|[\s,?]))A\.\s(.*?)[\s,]B\.\s(.*?)[\s,]C\.\s(.*?)[\s,]D\.\s(.*)", re.DOTALL)
_LEGACY_OPTIONS = re.compile(r"A\. (.+), B\. (.+), C\. (.+), D\. (.+)")


def split_instruction(instruction: str) -> tuple[str, dict[str, str]]:
    """
    The question of a row, up to its question mark where it has one, and its options `{letter: text}`.

    Raises:
        ValueError: if it does not end in the four options `A. .., B. .., C. .., D. ..`, with a question in front.
    """
    found = _LISTED.fullmatch(instruction)
    question, mark, _ = found[1].partition("?") if found else ("", "", "")
    if not question.strip():
        raise ValueError(
            f"The instruction {instruction!r} is not a question followed by 'A. .., B. .., C. .., D. ..'."
        )
    texts = [text.strip().rstrip(".,?") for text in found.groups()[1:]]
    return question.strip() + mark, dict(zip(LETTERS, texts, strict=True))


def parse_answer(reply: str, instruction: str, legacy: bool = False) -> str:
    """
    The letter a reply names, or `"other"`.

    Args:
        reply: what the model wrote.
        instruction: the row's question with its options.
        legacy: read replies as the 2023 code did, for figures comparable to that time: it took the "A" of "A cat" for
            option A, and a "B" anywhere for option B.
    """
    if not legacy:
        return parse_choice(reply, split_instruction(instruction)[1])
    if not is_answered(reply):
        return OTHER
    reply = read_reply(reply)
    if stated := re.search(r"The answer is ([A-D])", reply):
        return stated.group(1)
    for letter in LETTERS:
        if letter in reply:
            return letter
    if listed := _LEGACY_OPTIONS.search(instruction):
        for letter, text in zip(LETTERS, listed.groups(), strict=True):
            if text.strip(".,?").lower() in reply.lower():
                return letter
    return next((letter for letter in LETTERS if letter in reply.upper()), OTHER)


def judge_messages(question: str, reply: str, truth: str) -> list[dict[str, str]]:
    """
    What the judge of the free-form half is asked: is `reply` right, yes or no? To the byte the messages of the 2023
    evaluation (Otter, 8e9fb8c, whose later commits ask the same).
    """
    task = "Your task is to judge whether the model response is correct to answer the given question or not."
    lines = [f"Question: {question}", f"Model Response: {read_reply(reply)}", f"Ground Truth: {truth}"]
    lines.append("Will the model response be considered correct? You should only answer yes or no.")
    return [
        {"role": "system", "content": f"You are a helpful AI assistant. {task}"},
        {"role": "user", "content": "\n".join(lines)},
    ]


def parse_verdict(reply: str) -> str:
    """`"yes"`, `"no"` or, for any other reply of a judge, `"invalid"`. The 2023 code did not know "Yes."."""
    word = re.sub(r"^\W+|\W+$", "", read_reply(reply)).lower()
    return word if word in ("yes", "no") else "invalid"


def score(records: list[Mapping]) -> dict[str, float]:
    """Accuracy of the multiple-choice half; `records` have `prediction` and `answer`."""
    right = sum(record["prediction"] == record["answer"] for record in records)
    unread = sum(record["prediction"] == OTHER for record in records)
    return {"accuracy": percent(right, len(records)), "unparsed": unread, "questions": len(records)}


def score_freeform(records: list[Mapping]) -> dict[str, float]:
    """
    Accuracy of the free-form half over all rows, as in 2023; what was not judged counts as wrong, and is counted.

    Args:
        records: with `verdict`: "yes", "no", "invalid" (the judge said something else) or "failed" (it did not reply).
    """
    counts = {verdict: sum(record["verdict"] == verdict for record in records) for verdict in ("yes", "no")}
    invalid, failed = (sum(record["verdict"] == name for record in records) for name in ("invalid", "failed"))
    return {
        "freeform_accuracy": percent(counts["yes"], len(records)),
        "freeform_accuracy_of_judged": percent(counts["yes"], counts["yes"] + counts["no"]),
        "judge_invalid": invalid,
        "judge_failed": failed,
        "questions": len(records),
    }
