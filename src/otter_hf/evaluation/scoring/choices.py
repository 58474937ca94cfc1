"""Which option of a multiple-choice question a free reply names."""

import re
from collections.abc import Mapping


OTHER = "other"

_STATED = r"(?i:answer\s*(?:is|:)?)\s*:?\s*\(?([{letters}])(?![A-Za-z'])"
_LEADING = r"^\W*([{letters}])\s*(?:[.):,\]]|$)"
# a capital letter of its own; an "A" in front of a word is an article
_STANDALONE = r"(?<![A-Za-z'])([{letters}])(?![A-Za-z']|(?<=A)\s+(?!(?:and|or|because|as|is)\b)[A-Za-z])"


def parse_choice(reply: str, options: Mapping[str, str]) -> str:
    """
    The letter of the option a reply names, or `"other"`.

    First hit wins: a stated answer ("the answer is B"), a letter the reply opens with ("B", "(B) a dog", "b."), the
    only letter that stands by itself ("I choose B", but not the article of "A cat"), the only option whose text is in
    the reply as whole words. Of texts inside each other ("cat", "black cat") the longer counts.

    Args:
        reply: what the model wrote.
        options: letter -> text, capital letters.
    """
    reply = reply.strip()
    letters = "".join(options)
    by_text = _only_mentioned(reply, options)
    if stated := list(re.finditer(_STATED.format(letters=letters), reply)):
        # "the answer is A cat": an article, if one option is a cat
        article = stated[-1].group(1) == "A" and re.match(r"\s+[a-z]", reply[stated[-1].end() :])
        return by_text if article and by_text != OTHER else stated[-1].group(1)
    if len(reply) <= 2 and reply[:1].upper() in options:
        return reply[0].upper()
    if leading := re.match(_LEADING.format(letters=letters), reply):
        return leading.group(1)
    standing = set(re.findall(_STANDALONE.format(letters=letters), reply))
    return standing.pop() if len(standing) == 1 else by_text


def _only_mentioned(reply: str, options: Mapping[str, str]) -> str:
    named = {letter: text for letter, text in options.items() if _mentions(reply, text)}
    longest = [
        letter
        for letter, text in named.items()
        if not any(other != letter and _mentions(longer, text) for other, longer in named.items())
    ]
    return longest[0] if len(longest) == 1 else OTHER


def _mentions(reply: str, text: str) -> bool:
    text = text.strip().rstrip(".,?").lower()
    return bool(text) and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reply.lower()) is not None
