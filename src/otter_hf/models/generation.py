"""What `generate` needs alike in all families: tokens that are never answers, and no arguments that nobody reads."""

import torch
from transformers.cache_utils import Fp8QuantizedLayer
from transformers.generation import GenerationMixin, LogitsProcessor


def fp8_is_bounded(device: torch.device | str) -> bool:
    """
    Whether what is larger than float8_e4m3fn holds, 448, becomes its largest number there: with torch 2.13, while
    with 2.11 it becomes NaN.
    """
    return not torch.full((), 1e4, device=device).to(torch.float8_e4m3fn).isnan()


def end_tokens(config) -> list[int]:
    """The tokens that end an answer, of a configuration that may name several, one or none."""
    ends = config.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def context_length(model) -> int | None:
    """The most tokens that a model reads, the answer among them; None where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def stop_generation_at(model, token_id: int) -> None:
    """The token ends generation with this model, and with what is saved of it."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = [*end_tokens(config), *({token_id} - {*end_tokens(config)})]


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

    @staticmethod
    def _unread_length(input_ids, past_key_values, position_ids) -> int | None:
        """
        How many of the last tokens of whole prompts `(B, L)` a cache does not hold yet; None where `input_ids` are
        only what is new, and positions those of more. Assisted decoding of transformers 5.23 does not say the number,
        and would read a prompt on top of its own beginning.
        """
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if not seen or position_ids is None or position_ids.shape[1] != input_ids.shape[1] or position_ids[:, 0].any():
            return None
        return input_ids.shape[1] - seen

    def _get_logits_processor(self, *args, device=None, **kwargs):
        processors = super()._get_logits_processor(*args, device=device, **kwargs)
        # `<image>` is a place to put an image, not a word: generated, it would ask for an image that does not exist
        size, image_token_id = self.config.text_config.vocab_size, self.config.image_token_id
        excluded = [] if image_token_id is None or image_token_id >= size else [image_token_id]
        # rows that only round the embedding up to a multiple were never trained, and no tokenizer can read their ids
        if self.config.tokenizer_vocab_size is not None:
            excluded.extend(range(self.config.tokenizer_vocab_size, size))
        if excluded:
            processors.insert(0, ExcludeTokens(torch.tensor(excluded, device=device)))
        return processors

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """
        As in the parent class.

        Raises:
            ValueError: for a cache in float8 where later states that are larger than the first would become NaN.
        """
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        layers = getattr(model_kwargs.get("past_key_values"), "layers", ())
        if any(isinstance(layer, Fp8QuantizedLayer) for layer in layers) and not fp8_is_bounded(self.device):
            raise ValueError(
                f"The cache backend 'fp8' needs torch 2.13: with {torch.__version__} states that are larger than the "
                "first become NaN; take the backend 'quanto' or 'hqq'."
            )
