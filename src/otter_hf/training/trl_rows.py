"""Rows of TRL (https://huggingface.co/docs/trl) to the very tokens that `otter-hf train` trains on.

TRL tokenises prompt and answer of a row with images apart. SentencePiece tokenizers put a blank in front of a text's
first word, so the answer would start with other tokens than in the whole text, which the model is asked with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..data.collator import IGNORE_INDEX
from ..models.otterhd import OtterHDProcessor
from ..prompts import ANSWER_TOKEN, RESERVED_TOKENS, chat_template


# the template leaves these to the tokenizer, and TRL asks that for none; OtterHD's processor and template have theirs
_WHOLE = (
    "{{{{ bos_token }}}}{}{{%- if not add_generation_prompt -%}}"
    "{{%- generation -%}}{{{{ eos_token }}}}{{%- endgeneration -%}}{{%- endif -%}}"
)


@dataclass
class TRLCollator:
    """
    `data_collator` for TRL's `SFTTrainer` and `DPOTrainer`: each row is rendered with the processor's chat template,
    and tokenised as one text, BOS in front and EOS behind.

    A row has `images` (a list, may be empty) or `image`, and messages: `messages`, of which every answer is learned;
    `prompt` and `completion`; or `prompt`, `chosen` and `rejected`. Of the latter two forms the answers of the
    completion alone count.

    Args:
        processor: of an Otter, Flamingo or OtterHD. One without a chat template, as of OpenFlamingo, gets that of
            `simple`, in which `otter-hf train` writes, and is saved with it.
        max_length: rows are cut at so many tokens; None for no limit.

    Returns, when called, the processor's output, padded on the right, with `labels` `(B, L)` int64, -100 where nothing
        is learned; for preferences with `completion_mask` `(2 B, L)` int64 in place of it, the chosen ones first.

    Raises:
        ValueError: if a row has none of the three forms, texts in place of messages, or films, sound or tools; if
            cutting it would take a picture, or all that is learned of it, away.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.processor.chat_template is None:
            self.processor.chat_template = chat_template(
                "simple", getattr(self.processor, "reserved_tokens", RESERVED_TOKENS), [ANSWER_TOKEN]
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if "chosen" not in rows[0]:
            return self._collate([_conversation(row, "completion") for row in rows])
        pairs = [_conversation(row, kind) for kind in ("chosen", "rejected") for row in rows]
        batch = self._collate(pairs)
        batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
        return batch

    def _collate(self, conversations: list[tuple[list[dict], int]]) -> dict[str, torch.Tensor]:
        template = self.processor.chat_template
        if not isinstance(self.processor, OtterHDProcessor):
            template = _WHOLE.format(template)
        batch = self.processor.apply_chat_template(
            [messages for messages, _ in conversations],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "truncation": self.max_length is not None,
                "max_length": self.max_length,
                "add_special_tokens": False,
            },
        )
        learned = torch.as_tensor(batch.pop("assistant_masks")).bool() & batch["attention_mask"].bool()  # (B, L)
        starts = learned & ~torch.nn.functional.pad(learned, (1, 0))[:, :-1]
        number = starts.cumsum(dim=1)  # (B, L), 1 for the first answer
        for row, (_, before) in enumerate(conversations):
            learned[row] &= number[row] > before
            if not learned[row].any():
                raise ValueError(
                    f"A row is cut before what is to be learned of it: max_length={self.max_length} is too small for "
                    f"{conversations[row][0][-1]!r:.80}."
                )
        batch["labels"] = batch["input_ids"].masked_fill(~learned, IGNORE_INDEX)
        return dict(batch)


def _conversation(row: Mapping[str, Any], completion: str) -> tuple[list[dict], int]:
    """The messages of a row with its images in them, and how many of its answers, the first ones, are not learned."""
    for name in ("video", "videos", "audio", "audios", "tools"):
        if row.get(name) not in (None, [], "", "[]"):
            raise ValueError(f"A row has {name}, which is not trained on here: take the column out.")
    # beside chosen and rejected, some data sets have messages that are equal to one of them
    if row.get("messages") is not None and completion == "completion":
        messages, before = row["messages"], ()
    elif row.get("prompt") is not None and row.get(completion) is not None:
        before = row["prompt"]
        if isinstance(before, str) or isinstance(row[completion], str):
            raise ValueError(f"A row has texts as prompt and {completion}: give messages of role and content.")
        messages = [*before, *row[completion]]
    else:
        needed = "messages, or prompt and completion" if completion == "completion" else f"prompt and {completion}"
        raise ValueError(f"A row has {', '.join(row)}: it needs {needed}.")
    images = row["images"] if row.get("images") is not None else [row.get("image")]
    images = [image for image in images if image is not None]
    return prepare_multimodal_messages([*map(_given, messages)], images=images), sum(map(_is_answer, before))


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose parts are without the fields of other parts, which tables give all of them."""
    content = message.get("content")
    if isinstance(content, list):
        content = [{name: value for name, value in part.items() if value is not None} for part in content]
    return {**message, "content": content}


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"
