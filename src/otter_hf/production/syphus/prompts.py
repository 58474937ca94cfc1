"""What a language model is told and shown before it is asked: prompt files."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any


NUM_CANDIDATES = 9


@dataclass(frozen=True)
class Prompt:
    """The messages in front of a query, and how the query is put.

    Args:
        system_message: what to do; may be empty.
        in_context: worked examples, `(user, assistant)`.
        user_template: the user's turn; `{query}` stands for the query, `{candidates}` for 9 of the `candidates`.
        candidates: lines of which each query is given a few, drawn by its id.
    """

    system_message: str
    in_context: Sequence[tuple[str, str]] = ()
    user_template: str = "{query}"
    candidates: Sequence[str] = ()

    def messages(self, id: str, query: str) -> list[dict[str, str]]:
        """The chat that asks a query, `[{"role", "content"}]`; the same for the same id whenever it is asked."""
        chosen = random.Random(id).sample(self.candidates, min(NUM_CANDIDATES, len(self.candidates)))
        # the query last: what is in it is no template
        content = self.user_template.replace("{candidates}", "\n".join(chosen)).replace("{query}", query)
        messages = [{"role": "system", "content": self.system_message}] if self.system_message else []
        for user, assistant in self.in_context:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        return [*messages, {"role": "user", "content": content}]

    def to_json(self) -> dict[str, Any]:
        """As a prompt file holds it, see `load_prompt`."""
        turns = [turn for pair in self.in_context for turn in zip(("user", "assistant"), pair, strict=True)]
        return {
            "system_message": self.system_message,
            "in_context": [{"role": role, "content": content} for role, content in turns],
            "user_template": self.user_template,
            "candidates": list(self.candidates),
        }


def load_prompt(path: str | Path) -> Prompt:
    """Reads a prompt file, or the packaged one of that name, such as `"dense_captions"`.

    `{"system_message": text, "in_context": [{"role": "user" | "assistant", "content"}]}`, the format of the Otter
    repository. Contents are texts; that of an assistant may be a list of objects, which is written as lines
    `key: value`. Optional are `user_template` and `candidates`, see `Prompt`.

    Raises:
        FileNotFoundError: if there is neither a file nor a packaged prompt of that name.
        ValueError: naming the file and what is wrong in it.
    """
    packaged = files(__package__) / "prompt_files" / f"{path}.json"
    if Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8-sig")
    elif packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"There is no prompt file {path}, and no prompt of that name comes with the package.")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The prompt file {path} is no JSON: {error}.") from None
    return parse_prompt(content, f"The prompt file {path}")


def parse_prompt(content: Any, where: str) -> Prompt:
    """`load_prompt` of what was decoded already; `where` begins the messages of errors."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold an object, got {type(content).__name__}.")
    unknown = set(content) - {"system_message", "in_context", "user_template", "candidates"}
    if unknown:
        raise ValueError(f"{where} has unknown keys {sorted(unknown)}.")
    system, template = content.get("system_message"), content.get("user_template", "{query}")
    for key, text in (("system_message", system), ("user_template", template)):
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} must be a text, got {repr(text)[:60]}.")
    if "{query}" not in template:
        raise ValueError(f"{where}: user_template must contain {{query}}.")
    turns, candidates = content.get("in_context", []), content.get("candidates", [])
    if not isinstance(turns, list):
        raise ValueError(f"{where}: in_context must be a list of turns, got {repr(turns)[:60]}.")
    if not isinstance(candidates, list) or not all(isinstance(line, str) for line in candidates):
        raise ValueError(f"{where}: candidates must be a list of texts.")
    texts = []
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        role = turn.get("role") if isinstance(turn, dict) else None
        if role != expected:
            raise ValueError(f"{where}: turn {number} of in_context must have the role {expected!r}, got {role!r}.")
        texts.append(_turn_text(turn.get("content"), role, f"{where}: turn {number} of in_context"))
    if len(texts) % 2:
        raise ValueError(f"{where}: the last turn of in_context must be the assistant's.")
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Prompt(system, pairs, template, tuple(candidates))


def _turn_text(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if role == "assistant" and isinstance(content, list) and all(isinstance(item, Mapping) for item in content):
        return "".join(f"{key}: {value}\n" for item in content for key, value in item.items())
    forms = "a text" if role == "user" else "a text or a list of objects"
    raise ValueError(f"{where} must have {forms} as content, got {repr(content)[:60]}.")


def without_examples(prompt: Prompt) -> Prompt:
    """The prompt without its worked examples."""
    return replace(prompt, in_context=())
