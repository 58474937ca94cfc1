"""Any endpoint that speaks OpenAI's chat completions, and which of its failures are worth another attempt."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...extras import missing
from ...thinking import strip_thinking


# The original's; a null in the options leaves one out, for endpoints that refuse it.
DEFAULT_OPTIONS: Mapping[str, Any] = {"temperature": 0.7, "max_tokens": 3200, "top_p": 0.95}


@dataclass(frozen=True)
class ChatReply:
    """What a model answered. Token counts are None where the endpoint does not tell."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class TransientError(Exception):
    """Worth another attempt, after `retry_after` seconds where the endpoint names them."""

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class RejectedError(Exception):
    """The endpoint refuses this one request, and would again; `reply` is what it charged for all the same."""

    def __init__(self, reason: str, reply: "ChatReply | None" = None):
        super().__init__(reason)
        self.reply = reply


class EndpointError(OSError):
    """The endpoint would refuse every request: wrong key, unknown model, no credit, out of order."""


class ChatClient:
    """A chat model behind an OpenAI-compatible endpoint, through the `openai` package. Can be shared by threads.

    Args:
        model: its name there.
        base_url: such as `http://localhost:8000/v1`; default: `OPENAI_BASE_URL`, else OpenAI's.
        api_key: default: `OPENAI_API_KEY`; endpoints of your own may need none.
        options: what else goes into the request, over `DEFAULT_OPTIONS`; None as a value leaves that one out.
        timeout: seconds for an answer.

    Raises:
        ImportError: if `openai` is not installed.
        ValueError: if the address is none of HTTP, or the timeout is no time.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 120,
    ):
        try:
            import openai
        except ImportError:
            raise ImportError(missing("Syphus", "syphus")) from None
        if timeout <= 0:
            raise ValueError(f"timeout must be a number of seconds, got {timeout}.")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        check_address(base_url)
        self._openai = openai
        self.model = model
        self.options = request_options(options)
        # attempts are ours to count; an empty key is refused by the package, not by endpoints that want none
        api_key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)

    def complete(self, messages: Sequence[Mapping[str, Any]]) -> ChatReply:
        """The answer to a chat.

        Raises:
            TransientError: at 408, 409, 429, 5xx, timeouts, broken connections, and bodies that are no completion.
            RejectedError: at other 4xx, which concern this request (moderation is 403 or 400), and for replies that
                hold no answer: empty, cut off within a thought, or taken by a content filter.
            EndpointError: at 401, 402, 404, exhausted credit and options that it does not support, which concern all.
        """
        openai = self._openai
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=list(messages), extra_body=self.options
            )
        except openai.APIStatusError as error:
            raise _status_error(error) from None
        except openai.APITimeoutError:
            raise TransientError("no answer in time") from None
        except openai.APIConnectionError as error:
            raise TransientError(f"connection failed ({error.__cause__ or error})") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise TransientError(f"the body is no chat completion ({str(error)[:80]})") from None
        return read_completion(
            completion.model_dump(warnings=False) if hasattr(completion, "model_dump") else completion
        )


def check_address(base_url: str | None) -> None:
    """`ValueError` if it is no address of HTTP; None, for the default, is fine."""
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}.")


def request_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    The options of a request: the defaults with `options` over them, without those that are None.

    Raises:
        ValueError: for those that ask another model or other questions, or for more or less than one whole answer.
    """
    merged = {**DEFAULT_OPTIONS, **(options or {})}
    merged = {key: value for key, value in merged.items() if value is not None}
    for key, harmless in (("model", None), ("messages", None), ("stream", False), ("n", 1)):
        value = merged.get(key, harmless)
        if type(value) is not type(harmless) or value != harmless:
            raise ValueError(
                f"The option {key} cannot be {value!r:.80}, as a run asks its model for one whole answer to "
                "each query: leave it out."
            )
    return merged


def read_completion(body: Any) -> ChatReply:
    """The reply in the decoded body of a chat completion.

    Raises:
        TransientError: if it is none.
        RejectedError: if it holds no answer.
    """
    try:
        choice = body["choices"][0]
        message, usage = choice["message"] or {}, body.get("usage") or {}
        text = _content(message.get("content")) or message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError("content")
        tokens = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"the body is no chat completion: {str(body)[:80]}") from None
    reply = ChatReply(text, choice.get("finish_reason"), *(n if isinstance(n, int) else None for n in tokens))
    if reply.finish_reason == "content_filter":
        raise RejectedError("stopped by a content filter", reply)
    if not strip_thinking(text):
        cut = " at the limit of tokens" if reply.finish_reason == "length" else ""
        raise RejectedError(f"empty reply{cut}", reply)
    return reply


def _content(content: Any) -> Any:
    """The text of a message whose content may be a list of parts, as some endpoints write it."""
    if not isinstance(content, list):
        return content
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    return "".join(part["text"] or "" for part in parts if part.get("type", "text") in ("text", "output_text"))


def _status_error(error) -> Exception:
    told = error.body.get("message") if isinstance(error.body, dict) else None
    status, reason = error.status_code, f"HTTP {error.status_code}: {_first_line(str(told or error.message))}"
    if error.code in ("unsupported_parameter", "unsupported_value"):
        return EndpointError(
            f"The endpoint refuses all requests: {reason.rstrip('.')}; an option of null is not sent."
        )
    if status in (401, 402, 404) or error.code == "insufficient_quota":
        return EndpointError(f"The endpoint refuses all requests: {reason}.")
    if status in (408, 409, 429) or status >= 500:
        try:
            return TransientError(reason, float(error.response.headers.get("retry-after", "")))
        except ValueError:  # none, or a date
            return TransientError(reason)
    return RejectedError(reason)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]
