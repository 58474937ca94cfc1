"""Tokens of a tokenizer, and the rows that a model has for them."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..prompts import FUYU_IMAGE_TOKEN, IMAGE_TOKEN


logger = logging.getLogger(__name__)


def check_vocabulary(tokenizer: Any, config: PreTrainedConfig) -> None:
    """
    Raise ValueError for a tokenizer with more tokens than embeddings: one without would end the training in the
    middle, on CUDA without saying which it was. And for one whose image token is another than the model's: packed rows
    would train it, and the trained model look for the other.
    """
    rows = config.get_text_config().vocab_size + getattr(config, "additional_vocab_size", 0)  # the latter of Idefics
    vocabulary = tokenizer.get_vocab()
    token, token_id = max(vocabulary.items(), key=lambda entry: entry[1])
    if token_id >= rows:
        raise ValueError(
            f"The tokenizer's {token!r} has id {token_id}, but the model has embeddings of {rows} tokens only: call "
            f"model.resize_token_embeddings({token_id + 1}) and save it, or take the tokenizer it was trained with."
        )
    image_token = FUYU_IMAGE_TOKEN if config.model_type == "fuyu" else IMAGE_TOKEN
    own, models = vocabulary.get(image_token), getattr(config, "image_token_id", None)
    if None not in (own, models) and own != models:
        raise ValueError(
            f"The tokenizer has {image_token} at {own}, and the model looks for it at {models}: take the tokenizer it "
            "was trained with, or set image_token_id in its config.json."
        )


def ids_of_tokens(tokens: Sequence[str], tokenizer: Any) -> list[int]:
    """The ids of `train_embedding_rows`; ValueError for what is no token, which would be taken for the unknown one."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ValueError(f"train_embedding_rows: {token!r} is no token of the model's tokenizer.")
    return [vocabulary[token] for token in tokens]


def tell_positions(max_length: int, config: PreTrainedConfig) -> None:
    """Warns of samples that may be longer than what the decoder was made for, where answers get worse in silence."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        logger.warning(
            f"max_length is {max_length}, and the decoder was made for {positions} positions: longer samples reach "
            "those it has not learned."
        )
