"""Candidates of one answer, ranked by their log-probabilities: what they begin with alike is read once."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..models.prefix_cache import expand


# of the conversation's cache, which each candidate of a forward pass has, and of logits
_MAX_BYTES, _MAX_LOGITS = 2**29, 2**26


def score_candidates(
    model: PreTrainedModel,
    cache: Cache,
    first: torch.Tensor,
    candidates: Sequence[Sequence[int]],
    least: int = 8,
    extra: Callable[[int, int], Mapping] = lambda rows, width: {},
) -> list[tuple[float, int, bool]]:
    """
    How likely each candidate is behind a conversation.

    Its last token is never read, as nothing depends on it: a candidate of one token costs nothing at all. Of those
    that begin alike, such as `grey wolf` and `grey wolf spider`, the longest is read.

    Args:
        model: a causal one.
        cache: of the conversation, one row of S columns; it stays as it is.
        first: `(V,)` logits behind the conversation.
        candidates: their token ids, at least one each.
        least: candidates per forward pass, more where their copies of the cache fit into half a GiB.
        extra: more arguments of `forward`, by rows and their tokens.

    Returns:
        for each candidate the sum of its tokens' natural log-probabilities, its number of tokens, and whether greedy
        decoding would begin with it.
    """
    first = first.float().log_softmax(-1)
    likeliest = int(first.argmax())
    totals = [float(first[ids[0]]) for ids in candidates]
    greedy = [ids[0] == likeliest for ids in candidates]
    for read, members in _batches(cache, candidates, least, len(first)):
        width = len(read[0])
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in read], batch_first=True)
        past = cache.get_seq_length()
        # padding stands behind the tokens that count, which do not see it
        logits = model(
            input_ids=rows.to(first.device),
            attention_mask=torch.ones(len(read), past + width, dtype=torch.long, device=first.device),
            past_key_values=_copies(cache, len(read)),
            use_cache=True,
            **extra(len(read), width),
        ).logits  # (R, width, V)
        places = [(row, i, candidates[n][i + 1]) for row, n in members for i in range(len(candidates[n]) - 1)]
        row, place, token = torch.tensor(places, device=logits.device).unbind(1)
        logits = logits.float()
        chosen = (logits[row, place, token] - logits.logsumexp(-1)[row, place]).double().tolist()
        is_likeliest = (logits.argmax(-1)[row, place] == token).tolist()
        behind = iter(zip(chosen, is_likeliest, strict=True))
        for _, n in members:
            for _ in candidates[n][1:]:
                value, hit = next(behind)
                totals[n] += value
                greedy[n] &= hit
    return [(total, len(ids), hit) for total, ids, hit in zip(totals, candidates, greedy, strict=True)]


def _batches(
    cache: Cache, candidates: Sequence[Sequence[int]], least: int, num_logits: int
) -> Iterator[tuple[list[tuple], list[tuple[int, int]]]]:
    """What to read at a time, longest first, and which candidates `(row, number)` are in it."""
    heads: dict[tuple, list[int]] = {}
    for number, ids in enumerate(candidates):
        if len(ids) > 1:
            heads.setdefault(tuple(ids[:-1]), []).append(number)
    read: list[tuple[tuple, list[int]]] = []
    for head in sorted(heads, reverse=True):  # what begins with a head comes in front of it
        if read and read[-1][0][: len(head)] == head:
            read[-1][1].extend(heads[head])
        else:
            read.append((head, list(heads[head])))
    read.sort(key=lambda entry: len(entry[0]), reverse=True)
    layers = [states for layer in cache.layers for states in (layer.keys, layer.values) if states is not None]
    at_once = max(least, _MAX_BYTES // max(1, sum(states.nbytes for states in layers)))
    start = 0
    while start < len(read):
        size = min(at_once, max(least, _MAX_LOGITS // (num_logits * len(read[start][0]))))
        batch = read[start : start + size]
        yield [head for head, _ in batch], [(row, n) for row, (_, numbers) in enumerate(batch) for n in numbers]
        start += size


def _copies(cache: Cache, rows: int) -> Cache:
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        return expand(cache, [0] * rows)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(rows)
    return copied
