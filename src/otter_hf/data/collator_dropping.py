"""Batches without some of the tokens of the prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .prompts import IMAGE_TOKEN
from .samples import Sample


# entries of a batch that have a value for each token
_PER_TOKEN = ("input_ids", "attention_mask", "labels", "image_attention_mask")


@dataclass
class TokenDroppingCollator:
    """Deletes tokens from the batches of another collator, after the labels have been made with their help.

    For `<answer>` and the token that ends a turn, as `--remove_answer_token` and `--remove_eos_token` of the 2023
    training script did (Luodian/Otter). A model that is trained without the latter does not learn to stop.

    Args:
        collator: an `OtterCollator` or `IdeficsCollator` that pads.
        tokenizer: that of its processor.
        tokens: what to delete.

    Returns, when called, the batch of `collator`; ids, mask and labels are padded anew on the right, to the longest
    row that is left.

    Raises:
        ValueError: for a token that the tokenizer does not have, for `<image>`, and for packed batches.
    """

    collator: Callable[[Sequence[Sample]], dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase
    tokens: Sequence[str]

    def __post_init__(self):
        unknown = [token for token in self.tokens if token not in self.tokenizer.get_vocab()]
        if unknown or not self.tokens:
            raise ValueError(f"tokens must be some that the tokenizer has, got {list(self.tokens)}.")
        if IMAGE_TOKEN in self.tokens:
            raise ValueError(f"{IMAGE_TOKEN} cannot be deleted: it says where an image stands.")
        self._token_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(self.tokens)))

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = self.collator(samples)
        if "attention_mask" not in batch:
            raise ValueError("Tokens can only be deleted from padded batches: set packing=False.")
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()  # (B, L) each
        kept = mask & ~torch.isin(ids, self._token_ids)  # (B, L)
        length = int(kept.sum(dim=1).max())
        # the tokens that stay come first, in their order
        order = kept.long().argsort(dim=1, descending=True, stable=True)[:, :length]  # (B, length)
        stays = kept.gather(1, order)  # (B, length)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        fill = {"input_ids": pad, "labels": -100}
        for key in set(_PER_TOKEN) & set(batch):
            value = batch[key]  # (B, L) or (B, L, T)
            shape = (*order.shape, *[1] * (value.dim() - 2))
            value = value.gather(1, order.view(shape).expand(-1, -1, *value.shape[2:]))
            batch[key] = value.masked_fill(~stays.view(shape), fill.get(key, 0))
        return batch
