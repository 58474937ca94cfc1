"""What every score does with a reply before it reads it, and what it does with one that is no answer."""

import re
from collections.abc import Iterable

from ...thinking import strip_thinking


# lmms-eval's endpoints write their failures where a reply should be
FAILED_REQUEST = "[LMMS_EVAL_REQUEST_FAILED"

_REFUSAL = re.compile(
    r"""^\W*(?:(?:i['’]?m|i\s+am|we\s+are)\s+(?:\w+\s+)?(?:sorry|afraid)|sorry|(?:i|we)\s+apologi[sz]e|my\s+apologies
        |unfortunately)?\W*(?:but|however|that|for\s+the\s+\w+)?\W*(?:as\s+an?\s+(?:\w+\s+){0,3}(?:ai|model)\b[^,.]*)?\W*
        (?:(?:i|we)\s+(?:can(?:\s*no|['’])t|can\s+not|could(?:n['’]t|\s+not)|am\s+(?:unable|not\s+able)|won['’]t|will\s+not
        |must\s+decline)|(?:i|we)['’](?:m|re)\s+(?:unable|not\s+able))
        (?:\s+to)?(?:\s+be\s+able\s+to)?\s+
        (?:help|assist|answer|process|provide|determine|identify|comply|fulfil|fulfill|view|analy[sz]e|access|respond|engage
        |continue|do\s+that|tell|say|see\s+(?:the|any|this|that)?\s*(?:image|picture|photo)|to)\b""",
    re.IGNORECASE | re.VERBOSE,
)
# what follows a refusal where it was none: "I cannot identify any dog, so no", "I can't tell; my best guess is B"
_ANSWER = re.compile(
    r"""\b(?:guess|answer|choose|pick|but|so|thus|therefore|however)\b\W*(?:\w+\W+){0,4}?
        (?:(?i:yes|no)(?=\W*(?:$|[.,;!]))|\(?(?:[B-HJ-Z]|A)\b(?=\W*(?:$|[.,;!)])))
    |[.!;]\s*(?i:yes|no)\b(?=\W*(?:$|[.,;!]))""",
    re.VERBOSE,
)


def read_reply(reply: str) -> str:
    """The answer in a reply: without thoughts, and without white space around it."""
    return strip_thinking(reply)


def fate(reply: str) -> str:
    """
    What became of a question: `"answered"`, `"failed"` (the endpoint gave no reply), `"empty"` (nothing is left behind
    the thoughts, or there was nothing) or `"refused"` ("I'm sorry, but I can't help with that", and no answer behind).

    All but answers count as wrong in every score: as neither yes nor no, as no option, as no number. Captions and
    short answers are compared as they are, but those of failed requests, which count as empty ones.
    """
    if reply.startswith(FAILED_REQUEST):
        return "failed"
    answer = read_reply(reply)
    if not answer:
        return "empty"
    refusal = _REFUSAL.match(answer)
    return "refused" if refusal and not _ANSWER.search(answer, refusal.end()) else "answered"


def is_answered(reply: str) -> bool:
    """Whether there is an answer in a reply, see [`fate`]."""
    return fate(reply) == "answered"


def count_fates(replies: Iterable) -> dict[str, int]:
    """How many replies are no answers, as figures of a report, which has those that occur; numbers are skipped."""
    fates = [fate(reply) for reply in replies if isinstance(reply, str)]
    names = {"failed_requests": "failed", "empty_replies": "empty", "refusals": "refused"}
    return {name: fates.count(kind) for name, kind in names.items() if kind in fates}
