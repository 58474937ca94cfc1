"""A language model that judges replies, behind any OpenAI-compatible endpoint."""

import ast
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..thinking import strip_thinking
from .replies import ReplyLog


logger = logging.get_logger(__name__)

# reasoning models count their thoughts, which a grade of three tokens leaves no room for
_ROOM_FOR_THOUGHTS = 4096


class Judge:
    """
    Asks a judge; a question it did not reply to is None, never a score.

    Address and key come from the environment alone: `OPENAI_API_KEY`, and `OPENAI_BASE_URL` for servers other than
    OpenAI's.

    Args:
        model: its name, e.g. `gpt-4-0613`, which the figures of 2023 were judged by.
        log: where its replies are kept; what it replied once it is not asked again.
        timeout: seconds.
        max_retries: of errors that may pass (429, 5xx, timeouts), with the client's growing pauses.
        options: of every request, over those of the benchmark, e.g. `{"reasoning_effort": "low"}`; None leaves one
            out. An option that the endpoint says it does not support is left out by itself, with a warning, and
            `max_tokens` then called `max_completion_tokens`.

    Raises:
        ValueError: without a key, saying how to give one.
    """

    def __init__(
        self,
        model: str,
        log: ReplyLog | None = None,
        timeout: float = 30.0,
        max_retries: int = 5,
        options: Mapping[str, Any] | None = None,
    ):
        if not os.environ.get("OPENAI_API_KEY"):
            raise ValueError(
                f"The judge {model!r} needs a key: set OPENAI_API_KEY in the environment (any word for a local "
                "server) and OPENAI_BASE_URL for servers other than OpenAI's."
            )
        from openai import OpenAI

        self.model = model
        self._log = log
        self._options = dict(options or {})
        self._unsupported: set[str] = set()
        self._refuses_all = False
        self._client = OpenAI(timeout=timeout, max_retries=max_retries)

    def ask(self, messages: list[dict], temperature: float = 0.0, max_tokens: int = 256, run: int = 0) -> str | None:
        """
        The judge's reply to `messages` without its thoughts, or None if there is none after all retries, or an empty
        one; the reason is logged. A judge that refuses the key, or does not know the model, is asked no more.

        Args:
            messages: in OpenAI's form.
            temperature: of the judge's sampling.
            max_tokens: of the reply.
            run: another number asks again what was asked before.
        """
        request = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        request |= self._options
        key = self._log and self._log.key({"judge": request, "run": run})
        if key and (known := self._log.get(key)) is not None:
            return strip_thinking(known)
        if self._refuses_all:
            return None
        from openai import AuthenticationError, NotFoundError, OpenAIError

        try:
            reply = self._complete(request)
        except (AuthenticationError, NotFoundError) as error:
            self._refuses_all = True
            logger.warning(f"The judge {self.model!r} refuses all questions and is asked no more: {error}")
            return None
        except OpenAIError as error:
            logger.warning(f"The judge {self.model!r} did not reply: {error}")
            return None
        answer = strip_thinking(reply)
        if not answer:
            logger.warning(f"The judge {self.model!r} gave an empty reply.")
            return None
        if key:
            self._log.add({key: reply})
        return answer

    def _complete(self, request: dict) -> str:
        """The text of a completion; what the endpoint does not support is left out, once and for all."""
        from openai import BadRequestError

        while True:
            sent = {name: value for name, value in request.items() if value is not None}
            for name in self._unsupported & sent.keys():
                value = sent.pop(name)
                if name == "max_tokens":
                    sent.setdefault("max_completion_tokens", value + _ROOM_FOR_THOUGHTS)
            # what the client has no argument for is sent along as it is
            known = {name: sent.pop(name) for name in ("model", "messages")}
            try:
                message = self._client.chat.completions.create(**known, extra_body=sent).choices[0].message
            except BadRequestError as error:
                if error.code not in ("unsupported_parameter", "unsupported_value") or error.param not in sent:
                    raise
                logger.warning(f"The judge {self.model!r} does not support {error.param}={sent[error.param]!r}.")
                self._unsupported.add(error.param)
                continue
            return message.content or ""


def lmms_eval_constant(module: str, name: str) -> str:
    """
    A text constant of a module of lmms-eval, without running the module: those of MM-Vet and MathVista connect to
    their judge when imported.

    Raises:
        ValueError: if the installed version has no such constant.
    """
    path = Path(find_spec("lmms_eval").origin).parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"The installed lmms-eval has no {name} in {module}; otter-hf was tried with 0.7.3.")
