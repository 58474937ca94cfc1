"""What `generate` needs alike in all families: tokens that are never answers, and no arguments that nobody reads."""

import torch
from transformers.generation import GenerationMixin, LogitsProcessor


class ExcludeTokens(LogitsProcessor):
    """
    Never choose the tokens `token_ids (K,)`. transformers' `SuppressTokensLogitsProcessor` does the same by comparing
    the whole vocabulary with them in every step.
    """

    def __init__(self, token_ids: torch.Tensor):
        self.token_ids = token_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(1, self.token_ids, -torch.inf)  # (B, vocab)


class ImageTextGenerationMixin(GenerationMixin):
    """Generation that never answers with the place of an image, or with a row that no token of the tokenizer has."""

    def _get_logits_processor(self, *args, device=None, **kwargs):
        processors = super()._get_logits_processor(*args, device=device, **kwargs)
        # `<image>` is a place to put an image, not a word: generated, it would ask for an image that does not exist
        excluded = [] if self.config.image_token_id is None else [self.config.image_token_id]
        # rows that only round the embedding up to a multiple were never trained, and no tokenizer can read their ids
        if self.config.tokenizer_vocab_size is not None:
            excluded.extend(range(self.config.tokenizer_vocab_size, self.config.text_config.vocab_size))
        if excluded:
            processors.insert(0, ExcludeTokens(torch.tensor(excluded, device=device)))
        return processors
