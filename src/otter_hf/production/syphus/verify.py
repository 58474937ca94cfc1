"""Pairs that are worth training on: they cannot be answered without the pictures, and are answered alike again.

Each pair of a run is asked twice more, in a run of its own within the run's folder: its question without any picture,
and its question with the pictures. A pair is used if the blind answer does not agree with its answer, and the seeing
one does.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from ...files import write_text
from .datasets import VERIFICATION
from .filters import FilterRules
from .pictures import PictureOptions
from .queries import Query
from .replies import Invalid, Pair, ParsedReply
from .run import SyphusRun


# share of words, see `agrees`
AGREEMENT = 0.5


def drop_cut_pair(reply: dict[str, Any], parsed: ParsedReply) -> None:
    """Makes the last pair of a reply that ended at the limit of tokens an invalid piece, if nothing is behind it."""
    cut = reply["finish_reason"] == "length" and parsed.pairs
    if cut and reply["text"].rstrip().endswith(parsed.pairs[-1].answer):
        last = parsed.pairs.pop()
        parsed.invalid.append(Invalid(f"{last.question}\n{last.answer}", "cut off at the limit of tokens"))


def agrees(reply: str, answer: str, agreement: float = AGREEMENT) -> bool:
    """Whether two answers say the same.

    They do if they begin with the same yes or no, or share enough words: the F1 of their words, as SQuAD scores
    answers (https://huggingface.co/papers/1606.05250), without articles and punctuation, is at least `agreement`.
    """
    words = [_words(text) for text in (reply, answer)]
    if not all(words):
        return words[0] == words[1]
    firsts = [text[0] if text[0] in ("yes", "no") else None for text in words]
    if any(firsts):
        return firsts[0] == firsts[1]
    shared = sum((Counter(words[0]) & Counter(words[1])).values())
    return 2 * shared >= agreement * (len(words[0]) + len(words[1])) and shared > 0


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the")]


def verifications(run: SyphusRun) -> list[SyphusRun]:
    """The runs that verify the pairs of a run, as far as there are any; each goes on with `ask` like any other."""
    return [SyphusRun(path.parent) for path in sorted(run.folder.glob("verify-*/run.json"))]


def make_verification(run: SyphusRun, rules: FilterRules | None = None) -> SyphusRun | None:
    """Makes a run that verifies the pairs of `run` which no earlier one does; None if there are none.

    Args:
        run: made with `pictures` and `verify`.
        rules: pairs that they drop are not asked about; default: `FilterRules()`.

    Raises:
        ValueError: if the run is not to be verified.
    """
    if not run.settings.get("verify"):
        raise ValueError(f"The run in {run.folder} was not made to be verified: make one with verify.")
    known = {query.id for verification in verifications(run) for query in verification.queries()}
    rows = [row for row in _rows(run, rules or FilterRules()) if row["id"] not in known]
    if not rows:
        return None
    folder = run.folder / f"verify-{len(verifications(run)):05d}"
    folder.mkdir(exist_ok=True)
    annotations = folder / "pairs.jsonl"
    write_text(annotations, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    options = PictureOptions(**run.settings["pictures"])
    return SyphusRun.create(
        folder,
        VERIFICATION.name,
        annotations,
        run.settings["model"],
        base_url=run.settings["base_url"],
        options=run.settings["options"],
        pictures=replace(options, prefix=options.prefix or f"{run.dataset.short_name}_IMG_"),
    )


def _rows(run: SyphusRun, rules: FilterRules) -> Iterator[dict[str, Any]]:
    seen_ids = set()
    with run.journal() as journal:
        for query in run.queries():
            reply = journal.reply(query.id)
            if reply is None:
                continue
            parsed = run.dataset.parse(reply["text"], query)
            drop_cut_pair(reply, parsed)
            names = run.pictures.names(query)
            seen: set[str] = set()
            for pair in parsed.pairs:
                key = pair_key(query, pair)
                if rules.reason_to_drop(pair, seen) is None and names and key not in seen_ids:
                    seen_ids.add(key)
                    yield {"id": f"{key}/blind", "question": pair.question, "pictures": []}
                    yield {"id": f"{key}/seen", "question": pair.question, "pictures": names}


def pair_key(query: Query, pair: Pair) -> str:
    """Names a pair, whatever place it has in its reply."""
    text = f"{pair.question}\n{pair.answer}".encode("utf-8", "replace")
    return f"{query.id}#{blake2b(text, digest_size=6).hexdigest()}"


class Verdicts:
    """What the verifications of a run say of its pairs."""

    def __init__(self, run: SyphusRun, agreement: float = AGREEMENT):
        if not 0 < agreement <= 1:
            raise ValueError(f"agreement must be above 0 and at most 1, got {agreement}.")
        self.agreement = agreement
        self.replies: dict[str, str] = {}
        with ExitStack() as stack:
            for verification in verifications(run):
                journal = stack.enter_context(verification.journal())
                self.replies.update((id, journal.reply(id)["text"]) for id in journal.replies)

    def reason_to_drop(self, query: Query, pair: Pair) -> str | None:
        """Why a pair is not used, None if it is."""
        key = pair_key(query, pair)
        blind, seen = self.replies.get(f"{key}/blind"), self.replies.get(f"{key}/seen")
        if blind is None or seen is None:
            return "not verified"
        if agrees(blind, pair.answer, self.agreement):
            return "answered without the pictures"
        if not agrees(seen, pair.answer, self.agreement):
            return "another answer when asked again"
        return None
