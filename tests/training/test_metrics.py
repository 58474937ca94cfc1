"""Accuracy of whole answers."""

import numpy as np
import torch
from transformers import EvalPrediction

from otter_hf.training.metrics import answer_accuracy, most_likely_tokens


def test_an_answer_counts_only_as_a_whole():
    labels = np.array([[-100, -100, 5, 6, 2, -100, 7, 2], [-100, 8, 2, -100, -100, -100, -100, -100]])
    predictions = np.full_like(labels, 9)
    predictions[:, :-1] = labels[:, 1:]
    assert answer_accuracy(EvalPrediction(predictions, labels)) == {"answer_accuracy": 1.0}
    predictions[0, 2] = 9  # the middle token of the first of three answers
    assert answer_accuracy(EvalPrediction(predictions, labels)) == {"answer_accuracy": 2 / 3}
    predictions[0, 0] = 9  # no target
    predictions[1, 1] = 9  # the end of the third
    assert answer_accuracy(EvalPrediction(predictions, labels)) == {"answer_accuracy": 1 / 3}


def test_answers_of_neighbouring_rows_are_not_joined():
    labels = np.array([[-100, 5, 2], [-100, 6, 2]])
    predictions = np.array([[5, 2, 0], [6, 9, 0]])
    assert answer_accuracy(EvalPrediction(predictions, labels)) == {"answer_accuracy": 0.5}


def test_most_likely_tokens():
    logits = torch.randn(2, 3, 7)
    expected = logits.argmax(-1)
    assert torch.equal(most_likely_tokens(logits, None), expected)
    assert torch.equal(most_likely_tokens((logits, logits[:1]), None), expected)
