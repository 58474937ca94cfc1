"""What the server asks of `generate` that transformers has not."""

import threading

import torch
from transformers import LogitsProcessor, StoppingCriteria


class StopWhenCancelled(StoppingCriteria):
    """Ends generation when nobody reads on."""

    def __init__(self, cancelled: threading.Event):
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


class RepeatPenalty(LogitsProcessor):
    """
    OpenAI's penalties: from a token's logit its number in the answer so far times `frequency`, and `presence` if it is
    there at all.

    Args:
        prompt_length: tokens in front of the answer.
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float):
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)  # (B, V)
