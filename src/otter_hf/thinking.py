"""What models that think aloud write before their answer, and how it is left out.

Scores, judges, few-shot tests and data production all read replies through [`strip_thinking`]: a draft in a thought is
neither an answer nor a training record.
"""

import re


_NAMES = "think|thinking|thought|thoughts|reasoning|seed:think"
# <think> of DeepSeek, Qwen and most others, [THINK] of Magistral, the triangles of Kimi-VL
_OPEN = rf"(?:<(?:{_NAMES})\b[^<>]*>|\[think\]|◁think▷)"
_CLOSE = rf"(?:</(?:{_NAMES})\s*>|\[/think\]|◁/think▷)"
_BLOCK = re.compile(rf"{_OPEN}.*?{_CLOSE}", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def strip_thinking(reply: str) -> str:
    """
    The answer in a reply, without thoughts and white space around it.

    A chat template may have opened the thought: without `<think>` everything up to `</think>` is one. A thought that
    never ends, as the tokens ran out, leaves what stood before it, which is nothing as a rule. Of an answer within
    `<answer>..</answer>` its inside is taken.

    Args:
        reply: what the model wrote.
    """
    answer = _BLOCK.sub("", reply)
    answer = re.split(_CLOSE, answer, flags=re.IGNORECASE)[-1]
    answer = re.split(_OPEN, answer, maxsplit=1, flags=re.IGNORECASE)[0]
    if marked := _ANSWER.findall(answer):
        answer = marked[-1]
    return answer.strip()


def thinking_length(reply: str) -> int:
    """The number of characters at the head of a reply that are thoughts: the answer begins there, or nowhere."""
    ends = [found.end() for found in re.finditer(_CLOSE, reply, re.IGNORECASE)]
    start = ends[-1] if ends else 0
    return len(reply) if re.search(_OPEN, reply[start:], re.IGNORECASE) else start
