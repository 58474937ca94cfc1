"""
Which option of a multiple-choice question a free reply names.

The grammar, first hit wins; letters of a question are those it has, and every rule is the same for all of them:

1. nothing: a reply that is empty, failed or a refusal (see [`~otter_hf.evaluation.scoring.replies`]);
2. the whole reply is a letter, however it is set: `B`, `b`, `(B)`, `B.`, `**B**`, `[B]`, `Option B`, `\\boxed{B}`;
3. the whole reply is the text of an option, but for its article: `AC` is the option "AC", not the letters A and C;
4. a stated answer, of several the last: `the answer is B`, `Answer: (b)`, `I choose B`, `\\boxed{B}`;
5. a letter the reply opens with: `B. a dog`, `(B) because ..`, `B, as ..`, `B because ..`, `b) a dog`; not `A and B`;
6. a last line that is a letter;
7. the only letter that stands by itself outside of the options' texts, and is not denied ("not B");
8. the only option whose text is in the reply as whole words, and, of several, not denied; of texts inside each other
   ("cat", "black cat") the longer; of two options the one that the reply opens with ("Yes, no doubt").

Else `"other"`. "A" in front of a noun is an article, "I" in front of a verb a pronoun. VLMEvalKit's rules (`can_infer`
of ms-vlmeval 0.0.20) leave more replies to a language model; where they decide, these decide alike, but for texts of
options that hold the letter of another (docs/scores.md).
"""

import re
from collections.abc import Mapping

from .replies import is_answered, read_reply


OTHER = "other"

# no noun begins with these: "A because .." is the letter
_NO_NOUN = """
a an the this that these those it its he she they we you there here i because as since for due given based if when
where while whereas so then thus but and or nor not is was are were be been has have had do does did can could will
would should must may might seems appears shows show refers represents matches describes depicts indicates means
corresponds fits explains provides gives contains includes captures summarizes states says implies suggests reflects
looks sounds makes works stands holds however though although under after before using considering judging looking
per please thanks without about in on at of from with by to which who what according
""".split()
# these stand in front of nouns, too: "A best describes it" and "A most likely" are the letter, "A best guess" is not
_MODIFIERS = """
best better only alone obviously clearly definitely certainly probably likely surely most more again no yes
accurately correctly exactly all just simply correct right wrong
""".split()
_STATED = (
    r"(?:\b(?:answer|option|choice)(?:\s+(?:that|which)\s+\w+)?(?:\s+(?:is|are|was|would\s+be|should\s+be|must\s+be)"
    r"(?:\s+(?:therefore|thus|hence|clearly|definitely|probably|most\s+likely))?\s*:?|\s*[:=])"
    r"|\b(?:i|we|i'd|i'll)(?:\s+(?:would|will|should|must|think|believe|guess|say|it|it's|is))*"
    r"\s+(?:choose|chose|pick|select|go\s+with|vote\s+for|say|think\s+it(?:'s|\s+is)))"
    r"(?:\s+(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\b(?:\s+is)?\s*:?)?"
    r"|(?:答案|选择|选项|应选|故选|因此选|所以选)(?:应该|应)?(?:是|为|选)?(?:选项)?\s*[:：]?"
)
_DENIED = r"(?:not|n't|\binstead of|\brather than|\bneither|\bnor|\bunlike|\bexcept)\s+(?:\w+\s+)?"
_WRONG = r"\s+(?:is|was)(?:n't|\s+(?:not|wrong|incorrect|false))\b"
_AND = r"\s*(?:,|/|&|\band\b|\bor\b)\s*"
# what stands around a letter: brackets, quotes, markdown, TeX
_FRAME = r"""[\s"'`“”‘’*_#<>\[\](){}|$.:,;!?\-–—=/\\（）。，：；]*"""
# Chinese and Japanese keyboards write these letters
_WIDE = {wide: wide - 0xFEE0 for start in (0xFF21, 0xFF41) for wide in range(start, start + 26)}
_OPENING = r"""[\s"'`“”‘’*_#<\[({|$（]*"""
_CLOSING = r"""["'`”’*_>\])}|$]*"""


def parse_choice(reply: str, options: Mapping[str, str]) -> str:
    """
    The letter of the option a reply names, or `"other"`, by the grammar of this module.

    Args:
        reply: what the model wrote; its thoughts are left out.
        options: letter -> text, capital letters.
    """
    reply = read_reply(reply).translate(_WIDE)
    if not is_answered(reply):
        return OTHER
    reader = _Reader(options)
    return reader.whole(reply) or reader.stated(reply) or reader.leading(reply) or reader.within(reply) or OTHER


def parse_whole(reply: str, options: Mapping[str, str]) -> str:
    """As [`parse_choice`], of replies that are a letter, a text or both and nothing else (rules 2 and 3)."""
    reply = read_reply(reply).translate(_WIDE)
    reader = _Reader(options)
    if not is_answered(reply):
        return OTHER
    if letter := reader.whole(reply):
        return letter
    head = re.match(rf"{_OPENING}({reader.any}){_CLOSING}[\s.:,)-]+", reply, re.IGNORECASE)
    text = reader.whole(reply[head.end() :]) if head else None
    return head[1].upper() if head and text == head[1].upper() else OTHER


class _Reader:
    """The rules for the options of one question; each returns a letter, or None where it does not decide."""

    def __init__(self, options: Mapping[str, str]):
        self.options = {letter: str(text) for letter, text in options.items()}
        self.any = "|".join(map(re.escape, self.options))

    def whole(self, reply: str) -> str | None:
        """Rules 2 and 3."""
        texts = {letter: _plain(text) for letter, text in self.options.items()}
        for fold in (str, str.lower, _without_article):
            # a lower-case letter may be the text of an option
            if letter := self._bare(reply, fold):
                return letter
            if same := [letter for letter, text in texts.items() if text and fold(text) == fold(_plain(reply))]:
                return same[0] if len(same) == 1 else None
        return None

    def _bare(self, reply: str, fold=str.lower) -> str | None:
        flags = re.NOFLAG if fold is str else re.IGNORECASE
        name = r"(?i:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:option|choice|letter|answer)\b)?"
        boxed = r"(?:boxed\b|text\b)?"
        found = re.fullmatch(rf"{_FRAME}{name}{_FRAME}{boxed}{_FRAME}({self.any}){_FRAME}", reply, flags)
        return found and found[1].upper()

    def stated(self, reply: str) -> str | None:
        """Rule 4."""
        boxed = r"\\boxed\s*\{\s*(?:\\text(?:bf)?\s*\{)?\s*"
        found = None
        for found in re.finditer(rf"(?i:{_STATED}|{boxed}){_OPENING}({self.any})(?![A-Za-z0-9_'’+])", reply):  # noqa: B007
            pass
        for lower in re.finditer(rf"(?i:{_STATED}){_OPENING}((?i:{self.any}))(?=[)\].:}}*]|\s*$)", reply):
            found = lower if found is None or lower.start() > found.start() else found
        if found is None or self._is_article(reply, found) or self._is_list(reply, found):
            return None
        return found[1].upper()

    def leading(self, reply: str) -> str | None:
        """Rules 5 and 6."""
        items = rf"(?:^[\s*>-]*|\s)\(?({self.any})\)\s|^[\s*>-]*({self.any})(?:[.:]\s|\s*$)"
        if len({found[1] or found[2] for found in re.finditer(items, reply, re.MULTILINE)}) > 1:
            lines = reply.split("\n")
            return None if all(map(self._bare, lines)) else self._bare(lines[-1])
        name = r"(?:(?i:option|choice|letter)\s+)?"
        mark = r"(?:\.(?![A-Za-z]\.|\d)|[):\],;}*–—。，：；）]|-(?=\s|$)|\s|$)"
        found = re.match(rf"(?:(?i:both|either)\s)?{_OPENING}{name}{_OPENING}({self.any})(?={_CLOSING}{mark})", reply)
        if found and self._is_list(reply, found):
            return None
        if found and not self._is_article(reply, found) and not re.match(_WRONG, reply[found.end() :]):
            return found[1]
        if found := re.match(rf"{_OPENING}((?i:{self.any}))(?=[)\]:]|\.(?![A-Za-z]\.)\s?|\*\*)", reply):
            return found[1].upper()
        return self._bare(reply.split("\n")[-1])

    def within(self, reply: str) -> str | None:
        """Rules 7 and 8."""
        outside = reply
        for text in sorted(map(_plain, self.options.values()), key=len, reverse=True):
            if len(text) > 1:
                outside = re.sub(_words(text), lambda found: "\0" * len(found[0]), outside, flags=re.IGNORECASE)
        standing = set()
        for found in re.finditer(
            rf"(?<![A-Za-z0-9_'’&/.-])({self.any})(?![A-Za-z0-9_'’&/+]|\.\w|-\w|{_WRONG})", outside
        ):
            denied = re.search(rf"{_DENIED}{_OPENING}$", outside[: found.start()], re.IGNORECASE)
            if not denied and not self._is_article(reply, found):
                standing.add(found[1])
        if not standing:
            standing = {letter.upper() for letter in re.findall(rf"\(((?i:{self.any}))\)", outside)}
        return standing.pop() if len(standing) == 1 else self._only_mentioned(reply)

    def _is_list(self, reply: str, found: re.Match) -> bool:
        """Whether another letter is named along with this one: "A and B", "(A)(B)", "A, B"."""
        other = re.match(rf"{_CLOSING}{_AND}{_OPENING}({self.any})(?![A-Za-z0-9_])", reply[found.end(1) :])
        if other is None:
            other = re.match(rf"\)\s*\(({self.any})\)", reply[found.end(1) :])
        if other is None or other[1] == found[1]:
            return False
        # "B, A is wrong"
        return (
            re.match(r"\W*(?:$|,|&|/|and\b|or\b|are\b|both\b|could\b)", reply[found.end(1) + other.end() :])
            is not None
        )

    def _is_article(self, reply: str, found: re.Match) -> bool:
        """Whether the letter is the "A" of "A cat" or the "I" of "I think"."""
        after = re.match(r"\s+([A-Za-z]+)", reply[found.end(1) :])
        if found[1] not in ("A", "I") or after is None:
            return False
        if found[1] == "I":
            return after[1].islower()
        text = reply[found.end(1) :].strip().lower()
        named = (_without_article(_plain(option).lower()) for option in self.options.values())
        begins = any(option and re.match(_words(option), text) for option in named)
        words = re.match(r"(?:\s+[A-Za-z]+(?:['’][a-z]+)?(?![\w-]))*", reply[found.end(1) :])[0].lower().split()
        words = [re.split("['’]", word)[0] for word in words]
        following = next((word for word in words if word not in _MODIFIERS), None)
        is_letter = following in _NO_NOUN or (words and following is None)
        return begins or (not is_letter and after[1].islower())

    def _only_mentioned(self, reply: str) -> str | None:
        texts = {letter: _plain(text) for letter, text in self.options.items()}
        opening = [
            letter
            for letter, text in texts.items()
            if text and re.match(rf"{_OPENING}{_words(text)}{_CLOSING}\s*[,.;:!–—]", reply, re.IGNORECASE)
        ]
        if len(texts) == 2 and len(opening) == 1:
            return opening[0]
        for fold in (str, _without_article):
            forms = {letter: fold(text) for letter, text in texts.items()}
            named = {letter: text for letter, text in forms.items() if text and _mentions(reply, text)}
            longest = [
                letter
                for letter, text in named.items()
                if not any(other != letter and _mentions(longer, text) for other, longer in named.items())
            ]
            if len(longest) > 1:
                longest = [letter for letter in longest if not _is_denied(reply, named[letter])]
            if named:
                return longest[0] if len(longest) == 1 else None
        return None


def _plain(text: str) -> str:
    """A text without quotes, markdown and punctuation around it."""
    return re.sub(r"""^[\s"'`“”‘’*_]+|[\s"'`“”‘’*_.,;:!?]+$""", "", text)


def _without_article(text: str) -> str:
    return re.sub(r"^(?:an?|the)\s+", "", text.lower())


def _words(text: str) -> str:
    # "1" is neither in "1.5" nor in "1,000" nor in "-1"; Chinese has no spaces between words
    signed = r"(?<!(?<!\w)[-−])" if text[:1].isdigit() else ""
    before, behind = (r"(?<!\w)" if text[0] < "\u2e80" else ""), (r"(?!\w)" if text[-1] < "\u2e80" else "")
    return rf"{before}(?<!\d[.,]){signed}{re.escape(text)}{behind}(?![.,]\d)"


def _is_denied(reply: str, text: str) -> bool:
    places = re.finditer(_words(text), reply, re.IGNORECASE)
    return all(re.search(rf"{_DENIED}$", reply[: found.start()], re.IGNORECASE) for found in places)


def _mentions(reply: str, text: str) -> bool:
    return re.search(_words(text), reply, re.IGNORECASE) is not None
