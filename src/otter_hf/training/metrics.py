"""What is measured on held-out answers during training."""

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.collator import IGNORE_INDEX


def most_likely_tokens(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics`: `logits (B, L, vocab)`, or a tuple that starts with them -> ids `(B, L)`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(-1)


def answer_accuracy(predictions: EvalPrediction) -> dict[str, float]:
    """
    Share of answers of which every token, up to and with the end of the turn, is the most likely one given the true
    tokens before it: for a single-turn sample, the share that greedy decoding gets right to the letter.

    Args:
        predictions: `predictions (N, L)`, the most likely token after each position, and `label_ids (N, L)`, -100
            outside answers.
    """
    labels = predictions.label_ids[:, 1:]  # (N, L - 1)
    right = predictions.predictions[:, :-1] == labels  # (N, L - 1)
    target = labels != IGNORE_INDEX
    starts = target & ~np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    answer = np.cumsum(starts.ravel())[target.ravel()] - 1  # which answer each target token belongs to
    wrong = np.bincount(answer, weights=~right.ravel()[target.ravel()], minlength=int(starts.sum()))
    return {"answer_accuracy": float((wrong == 0).mean())}
