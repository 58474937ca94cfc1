"""What every score does with a reply before it reads it, and what it does with one that is no answer."""

import re
from collections.abc import Iterable

from ...thinking import strip_thinking


# lmms-eval's endpoints write their failures where a reply should be
FAILED_REQUEST = "[LMMS_EVAL_REQUEST_FAILED"

# what may stand in front of a refusal: an apology, "as an AI"
_OPENING = r"""^\W{0,6}(?:(?:i['’]?m|i\s+am|we\s+are)\s+(?:\w+\s+)?(?:sorry|afraid)|sorry|(?:i|we)\s+apologi[sz]e
    |my\s+apologies|unfortunately)?\W{0,6}(?:but|however|that|for\s+the\s+\w+)?\W{0,6}
    (?:as\s+an?\s+(?:[\w-]+\s+){0,3}(?:ai|model|assistant)\b[^,.]{0,80})?\W{0,6}"""
_PICTURE = r"(?:image|picture|photo|photograph|screenshot|figure|video)s?"
_SEEMS = r"(?:it\s+(?:seems|appears|looks)\s+(?:like|that|as\s+(?:if|though))\s+)?"
_HERE = r"in\s+(?:your|the|this)\s+(?:message|request|question|chat|conversation)|here|yet"
_NOT_GIVEN = rf"""(?:provided|attached|uploaded|shared|included|given|supplied|available|accessible|visible|loaded)
    (?=\W{{0,6}}(?:$|[.,;:!]|(?:to|for|so|and|with|{_HERE})\b))"""
# Verbs of what is not done. "I cannot see a dog", "I can't find one" and "It cannot be determined" are answers.
_DEED = rf"""(?:help|assist|answer|process|provide|determine|identify|comply|fulfill?|view|analy[sz]e|access|respond
    |engage|continue|do\s+(?:that|this|so)|tell|say|describe|discuss|give|offer|interpret|open|examine|assess|evaluate
    |complete|perform|generate|share|participate|speculate|recogni[sz]e|support|directly|(?:see|look\s+at)\s+(?:(?:the|an?|any
    |this|that|these|your)\s+)?(?:actual\s+|attached\s+|provided\s+)?{_PICTURE}|to)\b"""
_REFUSALS = [
    re.compile(pattern, re.IGNORECASE | re.VERBOSE)
    for pattern in (
        rf"""{_OPENING}(?:(?:i|we)\s+(?:can(?:\s*no|['’])t|can\s+not|could(?:n['’]t|\s+not)|(?:am|are)\s+(?:currently\s+)?
            (?:unable|not\s+able))|(?:i|we)['’](?:m|re)\s+(?:currently\s+)?(?:unable|not\s+able))
            (?:\s+to)?(?:\s+be\s+able\s+to)?\s+{_DEED}""",
        # whatever is not going to be done
        rf"""{_OPENING}(?:i|we)\s+(?:won['’]t|will\s+not|(?:must|have\s+to|need\s+to)\s+decline|refuse\s+to|decline\s+to
            |(?:would\s+)?prefer\s+not\s+to|(?:am|are)\s+not\s+(?:allowed|permitted|programmed|designed|trained)\s+to)\b""",
        rf"""{_OPENING}(?:i|we)['’](?:d\s+(?:rather|prefer)\s+not|ll\s+have\s+to\s+decline|(?:m|re)\s+not\s+(?:allowed|permitted
            |programmed|designed|trained)\s+to)\b""",
        rf"""{_OPENING}(?:i|we)\s+(?:do\s+not|don['’]t|cannot|can['’]t)\s+(?:currently\s+|actually\s+)?
            (?:have\s+(?:the\s+)?(?:access|ability|capability|capacity)\b
            |see\s+(?:an?|any|the)\s+{_PICTURE}\s*(?:{_NOT_GIVEN}|{_HERE})?\s*(?:[.,;!]|$))""",
        # no picture came with the question; "There is no picture of a dog" is an answer
        rf"""{_OPENING}{_SEEMS}
            (?:there\s+(?:is|was|are|were|appears\s+to\s+be)\s+no|there\s+(?:is|was)n['’]t\s+(?:an?|any)|no)\s+{_PICTURE}\s+(?:(?:that\s+)?(?:is|was|are|were|has|have)\s+)?
            (?:been\s+)?{_NOT_GIVEN}\b""",
        rf"""{_OPENING}{_SEEMS}(?:the|an?|your)\s+{_PICTURE}\s+
            (?:is|was|has|have|are|were|did)(?:\s+not|n['’]t)\s+(?:been\s+)?(?:{_NOT_GIVEN}|load)\b""",
        rf"""{_OPENING}{_SEEMS}you\s+(?:have|did)(?:\s*not|n['’]t)\s+(?:\w+\s+)?
            (?:provided?|attach(?:ed)?|upload(?:ed)?|shared?|included?)\s+(?:an?|any|the)\s+{_PICTURE}""",
        rf"""{_OPENING}(?:please|could\s+you(?:\s+please)?|can\s+you(?:\s+please)?)\s+(?:provide|attach|upload|share|send)\s+
            (?:me\s+)?(?:(?:with\s+)?(?:an?|the|your)\s+)(?:\w+\s+)?{_PICTURE}""",
        # Chinese, in both scripts
        r"""^\W{0,6}(?:(?:非常|很|十分|真的)?(?:抱歉|遗憾|遺憾)|对不起|對不起|不好意思)?\W{0,6}(?:但是?|不过|不過)?\W{0,6}
            (?:(?:作为|作為|身为|身為)[^，,。]{0,16}?(?:模型|助手|助理|AI|人工智能))?\W{0,6}(?:我|我们|我們|本模型)?(?:目前|现在|現在|暂时|暫時|并|並)?
            (?:无法|無法|不能|没法|沒法|没有办法|沒有辦法|不可以|不便|不会|不會|拒绝|拒絕)
            (?:够|夠)?(?:直接|为您|為您|为你|為你|给您|给你|给出|給出)?
            (?:回答|回应|回應|提供|协助|協助|帮助|幫助|处理|處理|识别|識別|辨认|辨認|分析|确定|確定|判断|判斷|满足|滿足|完成|访问|訪問|讨论|討論
            |继续|繼續|描述|解释|解釋|查看(?:这|這|该|該|图|圖|照)
            |看(?:到|见|見)?(?:您|你|这|這|该|該|任何)?(?:提供|上传|上傳|发送|發送)?的?[张張幅]?(?:图|圖|照片))""",
        r"""^\W{0,6}(?:(?:非常|很)?抱歉|对不起|對不起|不好意思)?\W{0,6}(?:但)?(?:您|你|这里|這裡)?\W{0,6}(?:似乎|好像)?
            (?:(?:没有|沒有|未|并未|並未)(?:提供|上传|上傳|附上|发送|發送|收到|显示|顯示)(?:任何)?(?:图|圖|照片)
            |(?:图片|图像|圖片|圖像|照片)(?:没有|沒有|未|未能|无法|無法)(?:被)?(?:提供|上传|上傳|显示|顯示|加载|載入))""",
        # Japanese
        r"""^\W{0,6}(?:(?:大変|誠に)?申し訳(?:ありません|ございません|ない(?:です)?)|すみません|すいません|ごめんなさい
            |恐れ入ります|恐縮です|残念ながら)?
            \W{0,6}(?:が|けど|けれど(?:も)?)?\W{0,6}[^。]{0,40}?
            (?:お答え|回答|お応え|提供|対応|お手伝い|支援|識別|特定|判断|判別|分析|処理|閲覧|説明|(?:画像|写真)を(?:見る|確認))
            (?:する)?(?:こと)?(?:は|が|も|を)?(?:でき(?:ません|ない|かねます)|いたしかねます|致しかねます|しかねます|できかねます)""",
        r"""^\W{0,6}(?:(?:申し訳(?:ありません|ございません)|すみません)が?)?\W{0,6}
            (?:画像|写真)(?:が|は)(?:ありません|(?:提供|添付|アップロード|共有)されて(?:いません|いない|おりません))""",
    )
]
# what follows a refusal where it was none: "I cannot identify any dog, so no", "I can't tell; my best guess is B"
_ANSWER = re.compile(
    r"""\b(?:guess|answer|choose|pick|but|so|thus|therefore|however)\b\W{0,6}(?:\w+\W{1,6}){0,4}?
        (?:(?i:yes|no)(?=\W{0,6}(?:$|[.,;!]))|\(?(?:[B-HJ-Z]|A)\b(?=\W{0,6}(?:$|[.,;!)])))
    |[.!;]\s*(?i:yes|no)\b(?=\W{0,6}(?:$|[.,;!]))
    |(?:[;:,，；：、]|答案|选|選|答え|\bis)\W{0,6}(?:是|为|為|は|が|(?i:option|answer|choice|letter))?\W{0,6}[A-HJ-Z](?![A-Za-z0-9])\W{0,6}$
    |(?:答案|选|選|答え)\W{0,6}(?:是|为|為|は|择|擇)?\W{0,6}[A-HJ-Z](?![A-Za-z0-9])""",
    re.VERBOSE,
)


def read_reply(reply: str) -> str:
    """The answer in a reply: without thoughts, and without white space around it."""
    return strip_thinking(reply)


def fate(reply: str) -> str:
    """
    What became of a question: `"answered"`, `"failed"` (the endpoint gave no reply), `"empty"` (nothing is left behind
    the thoughts, or there was nothing) or `"refused"` ("I'm sorry, but I can't help with that", "There is no image
    provided", also in Chinese and Japanese, and no answer behind).

    All but answers count as wrong in every score: as neither yes nor no, as no option, as no number. Captions and
    short answers are compared as they are, but those of failed requests, which count as empty ones.
    """
    if reply.startswith(FAILED_REQUEST):
        return "failed"
    answer = read_reply(reply)
    if not answer:
        return "empty"
    refusal = next(filter(None, (pattern.match(answer) for pattern in _REFUSALS)), None)
    return "refused" if refusal and not _ANSWER.search(answer, refusal.end()) else "answered"


def is_answered(reply: str) -> bool:
    """Whether there is an answer in a reply, see [`fate`]."""
    return fate(reply) == "answered"


def count_fates(replies: Iterable) -> dict[str, int]:
    """How many replies are no answers, as figures of a report, which has those that occur; numbers are skipped."""
    fates = [fate(reply) for reply in replies if isinstance(reply, str)]
    names = {"failed_requests": "failed", "empty_replies": "empty", "refusals": "refused"}
    return {name: fates.count(kind) for name, kind in names.items() if kind in fates}
