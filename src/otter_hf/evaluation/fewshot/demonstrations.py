"""Which training rows are shown before a question: at random, the same for all, or by similar pictures (RICES)."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...data.neighbours import embed_images
from ...files import replacing


def query_set(size: int, num_train: int, seed: int) -> list[int]:
    """At most `size` numbers of training rows that demonstrations are drawn from; the same for the same seed."""
    return sorted(random.Random(f"query set {seed}").sample(range(num_train), min(size, num_train)))


def test_subset(num_samples: int | None, num_test: int, seed: int) -> list[int]:
    """`num_samples` numbers of test rows, or all of them; the same for the same seed."""
    if num_samples is None or not 0 <= num_samples < num_test:
        return list(range(num_test))
    return sorted(random.Random(f"test set {seed}").sample(range(num_test), num_samples))


def random_demonstrations(
    candidates: Sequence[int],
    shots: int,
    seed: int,
    test_row: int,
    is_test_row: Callable[[int], bool] = lambda number: False,
) -> list[int]:
    """
    `shots` of `candidates`, drawn for this test row alone: the order in which rows are asked, and the process that
    asks them, change nothing.

    Args:
        candidates: numbers of training rows.
        shots: how many to draw.
        seed: of the trial.
        test_row: number of the row that is asked.
        is_test_row: whether a training row is the test row itself, which is then drawn again.

    Raises:
        ValueError: if there are fewer candidates than shots.
    """
    left = list(candidates)
    while shots <= len(left):
        drawn = random.Random(f"demonstrations {seed} {test_row}").sample(left, shots)
        if not (itself := {number for number in drawn if is_test_row(number)}):
            return drawn
        left = [number for number in left if number not in itself]
    raise ValueError(f"{shots} shots need as many training rows, there are {len(left)}.")


def fixed_demonstrations(
    candidates: Sequence[int], shots: int, seed: int, is_test_row: Callable[[int], bool] = lambda number: False
) -> list[int]:
    """
    `shots` of `candidates`, the same in the same order for all test rows, which then share their text as well; only
    where one is the test row itself, another one behind them takes its place.

    Raises:
        ValueError: if there are fewer candidates than shots.
    """
    drawn = random.Random(f"fixed demonstrations {seed}").sample(list(candidates), min(shots + 1, len(candidates)))
    chosen: list[int] = []
    for number in drawn:
        if len(chosen) < shots and not is_test_row(number):
            chosen.append(number)
    if len(chosen) < shots:
        raise ValueError(f"{shots} shots need as many training rows, there are {len(chosen)}.")
    return chosen


class RicesIndex:
    """
    Retrieval of in-context examples by similarity of pictures (arXiv:2109.05014), exact.

    Args:
        train: float `(N, D)`, a row per training picture.
        candidates: numbers of the training rows, `(N,)`.
    """

    def __init__(self, train: torch.Tensor, candidates: Sequence[int]):
        self._train = torch.nn.functional.normalize(train, dim=-1)
        self._candidates = list(candidates)

    def nearest(
        self, picture: torch.Tensor, shots: int, is_test_row: Callable[[int], bool] = lambda number: False
    ) -> list[int]:
        """
        The `shots` training rows with the largest cosine to `picture (D,)`, the most similar last, next to the
        question.

        Args:
            picture: features of the test row's picture.
            shots: how many.
            is_test_row: whether a training row is the test row itself, which is then passed over.

        Raises:
            ValueError: if there are fewer rows than shots.
        """
        cosine = self._train @ torch.nn.functional.normalize(picture, dim=-1)  # (N,)
        found: list[int] = []
        for i in cosine.sort(descending=True, stable=True).indices.tolist():
            if len(found) == shots:
                break
            if not is_test_row(self._candidates[i]):
                found.append(self._candidates[i])
        if len(found) < shots:
            raise ValueError(f"{shots} shots need as many training rows, there are {len(found)}.")
        return found[::-1]


def picture_features(rows, numbers: Sequence[int], encoder: str, cache: Path, batch_size: int = 64) -> torch.Tensor:
    """
    Features `(N, D)` of the pictures of `rows[numbers]` by any vision encoder of transformers, kept in a file.

    Args:
        rows: with an `image` each.
        numbers: which of them.
        encoder: folder or Hub id, see [`~otter_hf.data.neighbours.embed_images`].
        cache: the file, for these rows and this encoder.
        batch_size: pictures per forward pass.
    """
    if cache.is_file():
        return torch.load(cache, weights_only=True)
    features = embed_images((rows[number]["image"] for number in numbers), encoder, batch_size)
    with replacing(cache) as written:
        torch.save(features, written)
    return features
