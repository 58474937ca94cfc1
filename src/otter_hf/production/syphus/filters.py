"""Rules that a pair must keep to get into the dataset."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .replies import Pair


# A refusal, words about the annotation in place of the picture, a template that was copied.
FORBIDDEN = (
    r"\bas an? (?:\w+ )?(?:AI|artificial intelligence|language model)\b",
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:cannot|can't) (?:see|view|watch|access|help|assist)\b",
    r"\b(?:given|provided|supplied|above) "
    r"(?:\w+ )?(?:caption|description|annotation|narration|sentence|timestamp)s?\b",
    r"\b(?:according to|based on|mentioned in|stated in) the "
    r"(?:\w+ )?(?:caption|description|annotation|narration|sentence|timestamp|text)s?\b",
    r"^\W*x{3,}\W*$",
)


@dataclass(frozen=True)
class FilterRules:
    """Which pairs are used.

    Args:
        max_words: longest question or answer.
        forbidden: regular expressions, in any case, that neither may match.
        drop_repeated: drop a pair that another one of the same query repeats, but for case, spaces and punctuation.
    """

    max_words: int = 300
    forbidden: Sequence[str] = FORBIDDEN
    drop_repeated: bool = True

    def __post_init__(self):
        if self.max_words < 1:
            raise ValueError(f"max_words must be at least 1, got {self.max_words}.")
        for pattern in self.forbidden:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"The forbidden expression {pattern!r} is broken: {error}.") from None

    def reason_to_drop(self, pair: Pair, seen: set[str]) -> str | None:
        """Why a pair is not used, None if it is; `seen` collects the pairs of the query."""
        for text in (pair.question, pair.answer):
            if len(text.split()) > self.max_words:
                return f"more than {self.max_words} words"
            if any(re.search(pattern, text, re.IGNORECASE) for pattern in self.forbidden):
                return "forbidden words"
        key = " | ".join(" ".join(re.findall(r"\w+", text.casefold())) for text in (pair.question, pair.answer))
        if self.drop_repeated and key in seen:
            return "repeated pair"
        seen.add(key)
        return None
