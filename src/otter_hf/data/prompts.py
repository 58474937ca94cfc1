"""Instruction formats: the single source of training text, inference text and chat templates.

The formats are the four of the 2023 Otter repository (Luodian/Otter, MIT licence, `mimicit_dataset.py`), plus
`spaced`, the form of `simple` which its demos and benchmarks used for inference. See the Otter paper,
https://huggingface.co/papers/2305.03726.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields


IMAGE_TOKEN = "<image>"
ANSWER_TOKEN = "<answer>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"

# Text of a dataset or a user that equals one of these would become a special token: see `escape_reserved_tokens`.
RESERVED_TOKENS = (
    IMAGE_TOKEN,
    ANSWER_TOKEN,
    END_OF_CHUNK_TOKEN,
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<0x04>",
    "\x04",
    "<PAD>",
    "<s>",
    "</s>",
    "<|endoftext|>",
)


@dataclass(frozen=True)
class InstructionFormat:
    """The constant pieces of one turn, in the order in which they are written.

    A turn is `open`, the media of the turn, `ask`, the instruction, `reply`, `answer_lead`, the answer, `end`; turns
    are joined by `separator`. The media of a turn are `media_open`, one `media` per image or video, `media_close`. A
    generation prompt stops after `reply`.
    """

    open: str = ""
    media_open: str = ""
    media: str = IMAGE_TOKEN
    media_close: str = ""
    # in place of the media, in the first turn of a conversation without any image or video
    no_media_at_all: str = ""
    ask: str = ""
    reply: str = ""
    answer_lead: str = ""
    end: str = END_OF_CHUNK_TOKEN
    separator: str = ""


FORMATS = {
    "simple": InstructionFormat(ask="User:", reply=" GPT:<answer>"),
    "spaced": InstructionFormat(ask="User: ", reply=" GPT:<answer>", answer_lead=" "),
    # The lone newline of text-only conversations is a slip of the original that its checkpoints were trained with.
    "llama2": InstructionFormat(open="[INST]", media_close="\n", no_media_at_all="\n", reply="[/INST]<answer>"),
    "idefics": InstructionFormat(
        open="User:",
        media_open="<fake_token_around_image>",
        media="<image><fake_token_around_image>",
        reply="<end_of_utterance>\nAssistant:<answer>",
        end="<end_of_utterance>",
        separator="\n",
    ),
    # OpenFlamingo was not trained on a form: the text, such as "Question: ... Short answer:", is the user's own.
    "plain": InstructionFormat(),
    # Fuyu's processor writes the image tokens itself and ends the text with its own token.
    "fuyu": InstructionFormat(media="", ask="User:", reply=" Assistant:\x04", answer_lead=" ", end=""),
}


def get_format(name: str) -> InstructionFormat:
    """The instruction format called `name`; `ValueError` naming the known ones when there is none."""
    if name not in FORMATS:
        raise ValueError(f"Unknown instruction format {name!r}: use one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def escape_reserved_tokens(text: str, reserved_tokens: Sequence[str] = RESERVED_TOKENS) -> str:
    """Makes tokens that stand literally in `text` ordinary text: `<image>` becomes `< image>`.

    A space is put after the first character of each reserved token; one-character tokens are removed. The result is
    free of reserved tokens, and escaping it again changes nothing.
    """
    # Removal comes first because it can join two halves of a longer token.
    for token in sorted(reserved_tokens, key=len):
        if token in text:
            text = text.replace(token, token[0] + " " + token[1:] if len(token) > 1 else "")
    return text


def clean_text(text: str, *, answer: bool = False, keep_symbols: bool = True) -> str:
    """Cleans an instruction or an answer the way the original training did.

    Args:
        text: the raw string of the record.
        answer: whether `text` is an answer (stripped of all white space first, `\\r\\n` becomes `\\n`) or an
            instruction (spaces, then newlines, are stripped from both ends).
        keep_symbols: keep every character. `False` is the default of the original code: it deletes everything but
            word characters, white space and `.,?!()"'`, and joins runs of white space to one space. It destroys
            numbers with signs, boxes, and the punctuation of Chinese and Japanese.
    """
    if answer:
        text = text.strip()
    if not keep_symbols:
        text = re.sub(r"[^\w\s.,?!()\"']", "", text)
        if not answer:
            text = text.strip(" ")
        text = re.sub(r"\s{2,}", " ", text).strip("\n")
    return text.replace("\r\n", "\n") if answer else text.strip(" ").strip("\n")


def render(
    turns: Sequence[tuple[str, str | None]],
    format: str = "simple",
    media: str | Sequence[int] = "first",
    task_description: str | None = None,
    reserved_tokens: Sequence[str] = RESERVED_TOKENS,
) -> str:
    """Writes a conversation as one prompt string.

    Args:
        turns: `(instruction, answer)` pairs, oldest first. The answer of the last turn may be `None`: the result is
            then a generation prompt, which ends right after `<answer>` (or the format's counterpart).
        format: one of `FORMATS`.
        media: which turns carry an image placeholder: `"first"` (one, in the first turn), `"every"` (one in each
            turn: in-context examples), `"none"`, or the number of media of each turn.
        task_description: a line put before everything else.
        reserved_tokens: tokens which the text of the turns may not inject, see `escape_reserved_tokens`.

    Raises:
        ValueError: for an unknown format or `media`, for no turns, a count of media per turn that does not fit the
            turns, and for a missing answer in a turn that is not the last.
    """
    pieces = get_format(format)
    if not turns:
        raise ValueError("A conversation needs at least one (instruction, answer) turn, got none.")
    counts = media_counts(media, len(turns))
    rendered = []
    for index, ((instruction, answer), count) in enumerate(zip(turns, counts, strict=True)):
        text = pieces.open
        if count:
            text += pieces.media_open + pieces.media * count + pieces.media_close
        elif index == 0 and not any(counts):
            text += pieces.no_media_at_all
        text += pieces.ask + escape_reserved_tokens(instruction, reserved_tokens) + pieces.reply
        if answer is not None:
            text += pieces.answer_lead + escape_reserved_tokens(answer.strip(), reserved_tokens) + pieces.end
        elif index != len(turns) - 1:
            raise ValueError(f"Turn {index} of {len(turns)} has no answer: only the last turn may be without one.")
        rendered.append(text)
    prompt = pieces.separator.join(rendered)
    if task_description:
        prompt = escape_reserved_tokens(task_description, reserved_tokens) + "\n" + prompt
    return prompt


def media_counts(media: str | Sequence[int], num_turns: int) -> list[int]:
    """The number of media of each turn for the `media` argument of `render`."""
    named = {"first": [1] + [0] * (num_turns - 1), "every": [1] * num_turns, "none": [0] * num_turns}
    if isinstance(media, str):
        if media not in named:
            raise ValueError(f'media must be "first", "every", "none" or one number per turn, got {media!r}.')
        return named[media]
    if len(media) != num_turns:
        raise ValueError(f"media gives {len(media)} numbers for {num_turns} turns: give one number per turn.")
    return list(media)


# `%NAME%` stands for a piece of the format, written as a Jinja string literal.
_CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro escaped(text) -%}
    {{- text%escape% -}}
{%- endmacro -%}
{%- set media_types = ['image', 'image_url', 'video', 'video_url'] -%}
{%- set state = namespace(media=0, turns=0, asked=false) -%}
{%- for message in messages if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] in media_types -%}
        {%- set state.media = state.media + 1 -%}
    {%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and state.turns == 0 and not state.asked -%}
        {{- escaped(text_of(message['content'])) + '\\n' -}}
    {%- elif message['role'] == 'user' and not state.asked -%}
        {{- %separator% if state.turns else '' -}}
        {{- %open% -}}
        {%- set turn = namespace(media=0) -%}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] if part['type'] in media_types -%}
                {%- set turn.media = turn.media + 1 -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if turn.media -%}
            {{- %media_open% + %media% * turn.media + %media_close% -}}
        {%- elif state.turns == 0 and state.media == 0 -%}
            {{- %no_media_at_all% -}}
        {%- endif -%}
        {{- %ask% + escaped(text_of(message['content'])) -}}
        {%- set state.asked = true -%}
    {%- elif message['role'] == 'assistant' and state.asked -%}
        {{- %reply% + %answer_lead% + escaped(text_of(message['content']) | trim) + %end% -}}
        {%- set state.asked = false -%}
        {%- set state.turns = state.turns + 1 -%}
    {%- else -%}
        {{- raise_exception('After an optional system message, user and assistant must alternate and start with user: '
            ~ 'message ' ~ loop.index0 ~ ' has the role ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- %reply% -}}
{%- endif -%}
"""


def chat_template(
    format: str = "spaced", reserved_tokens: Sequence[str] = RESERVED_TOKENS, removed_tokens: Sequence[str] = ()
) -> str:
    """The Jinja template of a format for `apply_chat_template` of tokenizers and processors.

    Image and video parts of a user message become placeholders in front of its text, as many as there are parts; a
    system message becomes a line in front of everything; contents may be plain strings. The result equals `render` of
    the same conversation, without `removed_tokens`. Reserved tokens inside the texts are escaped. Messages that do not
    alternate raise an error.
    """
    pieces = get_format(format)
    template = _CHAT_TEMPLATE
    for field in fields(pieces):
        piece = getattr(pieces, field.name)
        for token in removed_tokens:
            piece = piece.replace(token, "")
        template = template.replace(f"%{field.name}%", _jinja_string(piece))
    escape = ""
    for token in sorted(reserved_tokens, key=len):
        safe = escape_reserved_tokens(token, [token])
        escape += f" | replace({_jinja_string(token)}, {_jinja_string(safe)})"
    return template.replace("%escape%", escape)


def _jinja_string(text: str) -> str:
    return json.dumps(text)
