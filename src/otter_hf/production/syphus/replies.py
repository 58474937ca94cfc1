"""Replies of language models to pairs of question and answer; what is none is kept with the reason."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .queries import Query


class Pair(NamedTuple):
    """An instruction and its answer; rounds of one conversation have its number."""

    question: str
    answer: str
    conversation: int | None = None


class Invalid(NamedTuple):
    """A piece of a reply that cannot be used, and why."""

    text: str
    reason: str


@dataclass
class ParsedReply:
    """What a reply holds, in its order."""

    pairs: list[Pair] = field(default_factory=list)
    invalid: list[Invalid] = field(default_factory=list)


class _Field(NamedTuple):
    name: str  # in lower case
    value: str


def parse_pairs(reply: str, query: Query | None = None) -> ParsedReply:
    """Reads `Question: ...` and `Answer: ...`, or JSON with such keys.

    Markers may be numbered, bold, in any case, or just `Q:` and `A:`; a text goes on until the next marker, over
    colons, line breaks and empty lines. In JSON, which may have a preface, complete objects are read even if the reply
    breaks off.
    """
    if _is_json(reply):
        return _pairs_of_objects(reply)
    fields = _fields(reply, ("question", "answer")) or _fields(reply, ("q", "a"))
    if not fields and "{" in reply:
        return _pairs_of_objects(reply)
    return _pair_up(fields, reply, ("question", "q"))


def parse_options(reply: str, query: Query | None = None) -> ParsedReply:
    """Reads multiple-choice questions: `Question`, `Options 1`, `Options 2`, ..., and the number of the `Answer`.

    The options become lines of the instruction, and the answer `<number>. <option>`.
    """
    parsed = ParsedReply()
    for fields in _starting_with("question", _fields(reply, ("question", "options?", "answer"))):
        text = "\n".join(f"{name}: {value}" for name, value in fields)
        question = next((value for name, value in fields if name == "question"), "")
        options = [value for name, value in fields if name.startswith("option")]
        answers = [value for name, value in fields if name == "answer"]
        reason = _wrong_choice(question, options, answers)
        if reason:
            parsed.invalid.append(Invalid(text, reason))
            continue
        number = _chosen(options, answers[0])
        lines = [question, *(f"{i}. {option}" for i, option in enumerate(options, start=1))]
        parsed.pairs.append(Pair("\n".join(lines), f"{number}. {options[number - 1]}"))
    return _or_nothing(parsed, reply, "there is no question in it")


def _wrong_choice(question: str, options: Sequence[str], answers: Sequence[str]) -> str | None:
    if not question:
        return "there is no question in front of it"
    if len(options) < 2 or not all(options):
        return f"{sum(map(bool, options))} options, at least 2 are needed"
    if len(answers) != 1:
        return f"{len(answers)} answers in place of one"
    if _chosen(options, answers[0]) is None:
        return f"the answer {answers[0]!r} is none of the {len(options)} options"
    return None


def _chosen(options: Sequence[str], answer: str) -> int | None:
    if answer in options:
        return options.index(answer) + 1
    number = re.match(r"\D{0,10}(\d+)\b", answer)
    return int(number[1]) if number and 1 <= int(number[1]) <= len(options) else None


def parse_conversations(reply: str, query: Query | None = None) -> ParsedReply:
    """Reads `Human:` and `Assistant:` rounds under headings `Conversation 1 - ...`; `Reason:` is left out.

    A conversation is used up to the first round that is not complete: later rounds may refer to it.
    """
    parsed = ParsedReply()
    pieces = re.split(r"(?im)^[\s>*#_]*conversation\s+\d+\b.*$", reply)
    for number, piece in enumerate(pieces[1:] if len(pieces) > 1 else pieces):
        fields = _fields(piece, ("human|user", "assistant", "reason"))
        fields = [found for found in fields if found.name != "reason"]
        for position in range(0, len(fields), 2):
            human, *rest = fields[position : position + 2]
            if human.name == "assistant" or [found.name for found in rest] != ["assistant"]:
                reason = "the rounds do not alternate from here on"
            elif not human.value or not rest[0].value:
                reason = "the round is not complete; later ones are left out too"
            else:
                parsed.pairs.append(Pair(human.value, rest[0].value, number))
                continue
            parsed.invalid.append(Invalid("\n".join(map(_shown, fields[position:])), reason))
            break
        if not fields:
            parsed.invalid.append(Invalid(piece, "there are no rounds in it"))
    return parsed


def parse_expansions(reply: str, query: Query) -> ParsedReply:
    """Reads `CH2Eng Translation: ...` and `Expansion_with_Eng_1: ...`: each answers the query's instruction."""
    parsed = ParsedReply()
    for name, value in _fields(reply, (r"ch2eng[ _]translation", r"expansion_with_eng_\d+")):
        if value:
            parsed.pairs.append(Pair(query.instruction or "", value))
        else:
            parsed.invalid.append(Invalid(f"{name}:", "there is no text behind it"))
    return _or_nothing(parsed, reply, "there is no translation in it")


def _or_nothing(parsed: ParsedReply, reply: str, reason: str) -> ParsedReply:
    if not parsed.pairs and not parsed.invalid:
        parsed.invalid.append(Invalid(reply, reason if reply.strip() else "the reply is empty"))
    return parsed


def _fields(text: str, names: Sequence[str]) -> list[_Field]:
    """The texts behind markers `name:` at the beginning of a line, up to the next marker."""
    marker = re.compile(
        rf"^(?:[\s>#-]|\*\s)*(?:\d+[.)]\s*)?(?P<bold>[*_]*)(?P<name>{'|'.join(names)})(?:\s*#?\d+)?\s*(?P<closed>(?P=bold))?\s*[:：]",
        re.IGNORECASE,
    )
    fields: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        found = marker.match(line)
        if found:
            rest = line[found.end() :].strip()
            # **Question:** has the end of the bold type behind the colon
            rest = rest if found["closed"] else rest.removeprefix(found["bold"])
            fields.append((found["name"].lower(), [rest]))
        elif fields:
            fields[-1][1].append(line.rstrip())
    return [_Field(name, _without_rule("\n".join(lines))) for name, lines in fields]


def _without_rule(text: str) -> str:
    """Without lines of dashes, or the number of what follows, that models put between pairs."""
    return re.sub(r"(\n\s*(?:[-*_=#`]{2,}|\d+[.)]))+\s*$", "", text).strip()


def _starting_with(name: str, fields: Sequence[_Field]) -> Iterator[list[_Field]]:
    group: list[_Field] = []
    for found in fields:
        if found.name == name and group:
            yield group
            group = []
        group.append(found)
    if group:
        yield group


def _pair_up(fields: Sequence[_Field], reply: str, asking: Sequence[str]) -> ParsedReply:
    parsed = ParsedReply()
    question: _Field | None = None
    for found in fields:
        if found.name in asking:
            if question:
                parsed.invalid.append(Invalid(_shown(question), "there is no answer to it"))
            question = found
        elif question is None:
            parsed.invalid.append(Invalid(_shown(found), "there is no question in front of it"))
        else:
            if question.value and found.value:
                parsed.pairs.append(Pair(question.value, found.value))
            else:
                empty = "question" if not question.value else "answer"
                parsed.invalid.append(Invalid(_shown(question if not question.value else found), f"empty {empty}"))
            question = None
    if question:
        parsed.invalid.append(Invalid(_shown(question), "there is no answer to it"))
    return _or_nothing(parsed, reply, "there is no question and no answer in it")


def _shown(found: _Field) -> str:
    return f"{found.name}: {found.value}"


def _is_json(reply: str) -> bool:
    return _without_fence(reply)[:1] in ("{", "[")


def _without_fence(reply: str) -> str:
    """The inside of a ```json block, if the reply has one."""
    fence = re.search(r"```(?:json)?\s*\n(.*?)(?:```|$)", reply, re.DOTALL | re.IGNORECASE)
    return (fence[1] if fence else reply).strip()


def _pairs_of_objects(reply: str) -> ParsedReply:
    parsed = ParsedReply()
    for text, item in _objects(_without_fence(reply)):
        if item is None:
            parsed.invalid.append(Invalid(text, "it is no complete JSON object"))
            continue
        pair = [
            str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
            for value in _question_and_answer(item)
        ]
        if all(pair):
            parsed.pairs.append(Pair(*pair))
        else:
            parsed.invalid.append(Invalid(text, "it has no question and answer"))
    return _or_nothing(parsed, reply, "there is no object in it")


def _question_and_answer(item: dict[str, Any]) -> list[Any]:
    lower = {str(key).lower(): value for key, value in item.items()}
    names = (("question", "instruction", "q"), ("answer", "response", "a"))
    return [next((lower[name] for name in same if name in lower), None) for same in names]


def _parts(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects in an object that is no pair itself, however deep; it, if there are none."""
    values = [] if any(value is not None for value in _question_and_answer(item)) else item.values()
    lists = [value if isinstance(value, list) else [value] for value in values]
    inner = [part for parts in lists for part in parts if isinstance(part, dict)]
    if not inner:
        yield item
    for part in inner:
        yield from _parts(part)


def _without_last_commas(text: str) -> str:
    """JSON without commas behind last members; strings are stepped over, so that what is in them stays."""
    return re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', lambda found: found[1] or "", text, flags=re.DOTALL)


def _objects(text: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The innermost objects of a JSON text that may break off; None for what is no object."""
    text = _without_last_commas(text)
    decode = json.JSONDecoder(strict=False).raw_decode
    start = text.find("{")
    while start >= 0:
        try:
            item, end = decode(text, start)
            parts = list(_parts(item))
        except (ValueError, RecursionError):
            # an object around a list that breaks off: its parts may be whole
            inner = text.find("{", start + 1)
            if inner < 0 or ":" not in text[start:inner] or "[" not in text[start:inner]:
                yield text[start : inner if inner >= 0 else None], None
            start = inner
            continue
        yield from ((json.dumps(part, ensure_ascii=False), part) for part in parts)
        start = text.find("{", end)


def tolerant_json(reply: str) -> Any:
    """The JSON in a reply, which may have text around it, line breaks in texts, and commas behind last members.

    Raises:
        ValueError: if there is none, or it breaks off.
    """
    text = _without_fence(reply)
    start = text.find("{")
    if start < 0:
        raise ValueError("there is no JSON object in it")
    try:
        return json.JSONDecoder(strict=False).raw_decode(_without_last_commas(text[start:]))[0]
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken ({error.msg})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
