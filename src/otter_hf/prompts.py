"""Instruction formats: the single source of training text, inference text and chat templates.

The formats are the four of the 2023 Otter repository (Luodian/Otter, MIT licence, `mimicit_dataset.py`), plus
`spaced`, the form of `simple` which its demos and benchmarks used for inference. See the Otter paper,
https://huggingface.co/papers/2305.03726.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any


IMAGE_TOKEN = "<image>"
FUYU_IMAGE_TOKEN = "|SPEAKER|"
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

    A turn is `open`, the media in front, `ask`, the instruction, `reply`, `answer_lead`, the answer, `end`; turns are
    joined by `separator`. The media in front are `media_open`, one `media` per image or video,
    `media_close`; those between words `media_open` and one `media` each. A generation prompt stops after `reply`.
    """

    open: str = ""
    media_open: str = ""
    media: str = IMAGE_TOKEN
    media_close: str = ""
    # whether the media in front of the first turn are also in front of the task description or system message
    media_before_system: bool = False
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
    # Fuyu's processor puts all patches of an image in the place of its token.
    "fuyu": InstructionFormat(
        media=FUYU_IMAGE_TOKEN,
        media_before_system=True,
        ask="User:",
        reply=" Assistant:\x04",
        answer_lead=" ",
        end="",
    ),
}


def get_format(name: str) -> InstructionFormat:
    """The instruction format called `name`; `ValueError` naming the known ones when there is none."""
    if name not in FORMATS:
        raise ValueError(f"Unknown instruction format {name!r}: use one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def reserved_tokens_of(tokenizer: Any) -> list[str]:
    """`RESERVED_TOKENS`, and what a tokenizer reads as a special token of its own, such as `<|im_end|>`."""
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*RESERVED_TOKENS, *tokenizer.all_special_tokens, *special})


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
    media_places: Sequence[Sequence[int]] | None = None,
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
        media_places: for each turn the places of its media: the number of characters of the instruction in front of
            each, in order. By default all stand in front, at 0.

    Raises:
        ValueError: for an unknown format or `media`, for no turns, a count of media per turn that does not fit the
            turns, places that do not fit the counts or the instruction, and for a missing answer in a turn that is
            not the last.
    """
    pieces = get_format(format)
    if not turns:
        raise ValueError("A conversation needs at least one (instruction, answer) turn, got none.")
    counts = media_counts(media, len(turns))
    places = [[0] * count for count in counts] if media_places is None else [list(of_turn) for of_turn in media_places]
    if [len(of_turn) for of_turn in places] != counts:
        raise ValueError(f"media_places holds places for {list(map(len, places))} media per turn, but media {counts}.")
    rendered, head = [], ""
    if task_description:
        head = escape_reserved_tokens(task_description, reserved_tokens) + "\n"
    for index, ((instruction, answer), of_turn) in enumerate(zip(turns, places, strict=True)):
        if of_turn != sorted(of_turn) or (of_turn and not 0 <= of_turn[0] <= of_turn[-1] <= len(instruction)):
            raise ValueError(
                f"media_places of turn {index} are {of_turn}: they must go up from 0 to at most the "
                f"{len(instruction)} characters of its instruction."
            )
        in_front = of_turn.count(0)
        text = pieces.media_open + pieces.media * in_front + pieces.media_close if in_front else ""
        if index == 0 and pieces.media_before_system:
            head, text = text + head, ""
        elif index == 0 and not any(counts):
            text = pieces.no_media_at_all
        text = pieces.open + text + pieces.ask
        start = 0
        for place, of_place in groupby(of_turn[in_front:]):
            text += escape_reserved_tokens(instruction[start:place], reserved_tokens)
            text += pieces.media_open + pieces.media * len(list(of_place))
            start = place
        text += escape_reserved_tokens(instruction[start:], reserved_tokens) + pieces.reply
        if answer is not None:
            text += pieces.answer_lead + escape_reserved_tokens(answer.strip(), reserved_tokens) + pieces.end
        elif index != len(turns) - 1:
            raise ValueError(f"Turn {index} of {len(turns)} has no answer: only the last turn may be without one.")
        rendered.append(text)
    return head + pieces.separator.join(rendered)


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


# `%NAME%` stands for a piece of the format, written as a Jinja literal.
_CHAT_TEMPLATE = """\
{%- set media_types = ['image', 'image_url', 'video', 'video_url'] -%}
{%- macro escaped(text) -%}
    {%- set safe = namespace(text=text) -%}
    {%- for token, instead in %escape% if token in safe.text -%}
        {%- set safe.text = safe.text | replace(token, instead) -%}
    {%- endfor -%}
    {{- safe.text -}}
{%- endmacro -%}
{%- macro refused(index, what) -%}
    {{- raise_exception('messages[' ~ index ~ '] ' ~ what) -}}
{%- endmacro -%}
{%- macro checked(message, index) -%}
    {%- if message['tool_calls'] -%}
        {{- refused(index, 'has tool_calls, which this model does not know; leave them out.') -}}
    {%- elif message['content'] is not defined -%}
        {{- refused(index, 'has no content.') -}}
    {%- elif message['content'] is not string -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in media_types and message['role'] != 'user' -%}
                {{- refused(index, 'has the role ' ~ message['role'] ~ ' and holds a picture or video, which only '
                    ~ 'messages of the role user may.') -}}
            {%- elif part['type'] not in media_types and (part['type'] != 'text' or part['text'] is not string) -%}
                {{- refused(index, 'holds a part of the type ' ~ part['type'] ~ '; parts must be of the type text '
                    ~ '(with a text), ' ~ media_types | join(', ') ~ '.') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro leading_media(content) -%}
    {%- set seen = namespace(media=0, words=content is string) -%}
    {%- for part in content if content is not string -%}
        {%- if part['type'] != 'text' -%}
            {%- set seen.media = seen.media + (0 if seen.words else 1) -%}
        {%- elif part['text'] -%}
            {%- set seen.words = true -%}
        {%- endif -%}
    {%- endfor -%}
    {{- seen.media -}}
{%- endmacro -%}
{%- macro media_in_front(content) -%}
    {%- set count = leading_media(content) | int -%}
    {{- %media_open% + %media% * count + %media_close% if count else '' -}}
{%- endmacro -%}
{%- macro words_and_media(content) -%}
    {%- if content is string -%}
        {{- escaped(content) -}}
    {%- else -%}
        {%- set in_front = leading_media(content) | int -%}
        {%- set run = namespace(text='', media=0, after_media=false) -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {%- set run.text = run.text + part['text'] -%}
                {%- set run.after_media = run.after_media and not part['text'] -%}
            {%- elif run.media < in_front -%}
                {%- set run.media = run.media + 1 -%}
            {%- else -%}
                {{- escaped(run.text) + ('' if run.after_media else %media_open%) + %media% -}}
                {%- set run.text = '' -%}
                {%- set run.after_media = true -%}
            {%- endif -%}
        {%- endfor -%}
        {{- escaped(run.text) -}}
    {%- endif -%}
{%- endmacro -%}
{%- set state = namespace(media=0, turns=0, asked=false, first='') -%}
{%- if tools or documents -%}
    {{- raise_exception('tools and documents are not supported by this model; leave them out.') -}}
{%- endif -%}
{%- for message in messages -%}
    {{- checked(message, loop.index0) -}}
    {%- if message['role'] == 'user' and message['content'] is not string -%}
        {%- for part in message['content'] if part['type'] != 'text' -%}
            {%- set state.media = state.media + 1 -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if %media_before_system% -%}
    {%- for message in messages if message['role'] == 'user' -%}
        {%- if loop.first -%}
            {{- media_in_front(message['content']) -}}
        {%- endif -%}
    {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and state.turns == 0 and not state.asked -%}
        {{- escaped(text_of(message['content'])) + '\\n' -}}
    {%- elif message['role'] == 'user' and not state.asked -%}
        {{- %separator% if state.turns else '' -}}
        {{- %open% -}}
        {%- if state.media == 0 and state.turns == 0 -%}
            {{- %no_media_at_all% -}}
        {%- elif state.turns or not %media_before_system% -%}
            {{- media_in_front(message['content']) -}}
        {%- endif -%}
        {{- %ask% + words_and_media(message['content']) -}}
        {%- set state.asked = true -%}
    {%- elif message['role'] == 'assistant' and state.asked -%}
        {{- %reply% -}}
        {%- generation -%}
            {{- %answer_lead% + escaped(text_of(message['content']) | trim) + %end% -}}
        {%- endgeneration -%}
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
    format: str = "spaced",
    reserved_tokens: Sequence[str] = RESERVED_TOKENS,
    removed_tokens: Sequence[str] = (),
    answer_lead: str | None = None,
    bos: bool = False,
) -> str:
    """The Jinja template of a format for `apply_chat_template` of tokenizers and processors.

    Image and video parts of a user message become placeholders where they stand: those in front of all text in front
    of the turn, as the original trained, the others between the words. A system message becomes a line in front of
    everything; contents may be plain strings. The result equals `render` of the same conversation, without
    `removed_tokens`. Reserved tokens inside the texts are escaped. Answers are marked with `{% generation %}`, from
    where the model goes on to the token that ends the turn, for `return_assistant_tokens_mask`. Messages that do not
    alternate, parts of other types, tools and documents raise an error.

    `answer_lead` takes the place of the format's own, see `FlamingoCollator`; `bos` puts the tokenizer's BOS in front,
    see `OtterCollator.adds_bos`.
    """
    pieces = get_format(format)
    if answer_lead is not None:
        pieces = replace(pieces, answer_lead=answer_lead)
    template = "{{- bos_token -}}" * bos + _CHAT_TEMPLATE
    for field in fields(pieces):
        piece = getattr(pieces, field.name)
        for token in removed_tokens if isinstance(piece, str) else ():
            piece = piece.replace(token, "")
        template = template.replace(f"%{field.name}%", _jinja_literal(piece))
    escape = [[token, escape_reserved_tokens(token, [token])] for token in sorted(reserved_tokens, key=len)]
    return template.replace("%escape%", _jinja_literal(escape))


def read_chat_template(source: str, reserved_tokens: Sequence[str] = RESERVED_TOKENS) -> str:
    """
    The template that a user names: an instruction format (see `chat_template`), a Jinja file, or itself. OSError if it
    is neither.
    """
    if source in FORMATS:
        return chat_template(source, reserved_tokens)
    return source if "{" in source else Path(source).read_text(encoding="utf-8")


def _jinja_literal(value: str | bool | list) -> str:
    return json.dumps(value)
