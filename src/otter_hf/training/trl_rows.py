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
        processor: of an Otter, Flamingo or OtterHD.
        max_length: rows are cut at so many tokens; None for no limit.

    Returns, when called, the processor's output, padded on the right, with `labels` `(B, L)` int64, -100 where nothing
        is learned; for preferences with `completion_mask` `(2 B, L)` int64 in place of it, the chosen ones first.

    Raises:
        ValueError: if a row has none of the three forms, or cutting it would take a picture or all of its answer away.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if "chosen" not in rows[0]:
            return self._collate([_conversation(row, "completion") for row in rows])
        pairs = [_conversation(row, kind) for kind in ("chosen", "rejected") for row in rows]
        batch = self._collate(pairs)
        batch["completion_mask"] = (batch.pop("labels") != IGNORE_INDEX).long()
        return batch

    def _collate(self, conversations: list[tuple[list[dict], int | None]]) -> dict[str, torch.Tensor]:
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
        for row, (_, answers) in enumerate(conversations):
            if answers is not None:
                learned[row] &= number[row] > number[row, -1] - answers
        batch["labels"] = batch["input_ids"].masked_fill(~learned, IGNORE_INDEX)
        return dict(batch)


def _conversation(row: Mapping[str, Any], completion: str) -> tuple[list[dict], int | None]:
    """The messages of a row with its images in them, and how many of its answers, the last ones, are learned."""
    if "messages" in row:
        messages, answers = row["messages"], None
    elif "prompt" in row and completion in row:
        messages = [*row["prompt"], *row[completion]]
        answers = sum(message["role"] == "assistant" for message in row[completion])
    else:
        raise ValueError(f"A row has {', '.join(row)}: it needs messages, or prompt and {completion}.")
    images = row["images"] if "images" in row else [row["image"]] if "image" in row else []
    return prepare_multimodal_messages([dict(message) for message in messages], images=list(images or [])), answers
