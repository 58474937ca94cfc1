"""CIDEr (arXiv:1411.5726) of captions, by pycocoevalcap 1.2."""

import re
import shutil
from collections.abc import Mapping, Sequence
from unicodedata import category

from ...reading import whole_characters
from .replies import fate, read_reply


# what PTBTokenizer of the COCO caption evaluation drops; brackets it means to drop, but keeps under these names
_PUNCTUATION = set(".?!,:-;'`\"") | {"''", "``", "--", "..."}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TOKENS = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.]\w+)*|\S")


def tokenize(caption: str) -> str:
    """Lower-case words with clitics split off ("do n't", "dog 's") and without punctuation, joined by spaces."""
    tokens = (_BRACKETS.get(token, token) for token in _TOKENS.findall(caption.lower()))
    return " ".join(token for token in tokens if token not in _PUNCTUATION)


def one_line(caption: str) -> str:
    """
    A caption with single spaces for control characters and white space of all kinds. The Java tokenizer takes captions
    by the line: a carriage return, form feed or U+2028 in one would shift all those behind it.
    """
    caption = whole_characters(caption)
    return " ".join("".join(" " if category(letter) == "Cc" else letter for letter in caption).split())


def clean_reply(reply: str) -> str:
    """A reply's caption as the 2023 suite cut it: up to `Output`, without double quotes; "" of a failed request."""
    if fate(reply) == "failed":
        return ""
    return read_reply(reply).split("Output")[0].replace('"', "").strip()


def score(records: Sequence[Mapping], scores: Sequence[float] | None = None) -> dict[str, float | str]:
    """
    CIDEr times 100, as in 2023, and `tokenizer`: "PTB" where Java can run the official one, else "python", ours, whose
    scores may differ in the second decimal.

    Args:
        records: with `id`, `caption` (the model's) and `references` (people's). Words weigh by how many of *these*
            images have them: scores of different subsets do not compare.
        scores: what `scores_of` gives for the records, where it is known.
    """
    scores = scores_of(records) if scores is None else scores
    tokenizer = "PTB" if _has_java() else "python"
    return {"cider": sum(scores) / max(1, len(scores)), "tokenizer": tokenizer, "images": len(records)}


def scores_of(records: Sequence[Mapping]) -> list[float]:
    """CIDEr times 100 of each record, whose mean is the score of all; see `score`."""
    from pycocoevalcap.cider.cider import Cider

    references = {record["id"]: [one_line(text) for text in record["references"]] for record in records}
    captions = {record["id"]: [one_line(record["caption"])] for record in records}
    if _has_java():
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        references, captions = (
            PTBTokenizer().tokenize({key: [{"caption": text} for text in texts] for key, texts in table.items()})
            for table in (references, captions)
        )
    else:
        references, captions = (
            {key: [tokenize(text) for text in texts] for key, texts in table.items()}
            for table in (references, captions)
        )
    _, scores = Cider().compute_score(references, captions)  # in the order of the references
    by_id = dict(zip(references, scores, strict=True))
    return [100.0 * float(by_id[record["id"]]) for record in records]


def _has_java() -> bool:
    return shutil.which("java") is not None
