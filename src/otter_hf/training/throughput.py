"""What a training step is made of and how fast it is: tokens, waiting for data, use of the device, loss by task."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import TrainerCallback

from ..data.collator import IGNORE_INDEX
from .flops import TrainingFlops


# loss of batches with samples of several task groups
MIXED = "mixed"


def count_batch(batch: dict) -> dict[str, int]:
    """
    What `Throughput` counts of a batch, best while it is on the CPU, where reading waits for nothing.

    Returns:
        `tokens` without padding, `labels`, `pixels` as frames, `media`, and `squares`: of the samples' lengths.
    """
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(dim=1)
    elif "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff().long()
    else:
        lengths = torch.full((len(ids),), ids.shape[1])
    counts = {"tokens": int(lengths.sum()), "squares": int((lengths**2).sum()), "media": 0, "pixels": 0}
    counts["labels"] = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim == 6:
        frames = batch.get("pixel_attention_mask", torch.ones(pixels.shape[:3]))  # (B, T, F)
        counts["media"] = int(frames.any(dim=2).sum())
        counts["pixels"] = int(frames.sum())
    return counts


_COUNTS = ("samples", "tokens", "labels", "pixels", "media", "squares", "seconds", "waiting")


class Throughput(TrainerCallback):
    """
    Counts what the training steps between two logs took; the time of evaluations and checkpoints is not in it.

    Values of the logs, of all devices together:
        `tokens_per_second`: tokens without padding, `samples_per_second`;
        `data_wait`: share of the time in which the device waited for the data loader;
        `mfu`: model FLOP utilisation (https://huggingface.co/papers/2204.02311), the share of the devices' peak that
        forward and backward pass reach; what checkpointing computes again does not count;
        `peak_memory_gb`: of the device since the start, on a CPU of the process; of the one with the most;
        `loss/<task group>`: mean loss of a label in batches of this group.

    Args:
        task_groups: all that there are in the data, in any order; the same on all processes.
        flops: operations of a step; without them there is no `mfu`.
        peak_flops: operations per second of one device; without them there is no `mfu`.
    """

    def __init__(self, task_groups: Iterable[str], flops: TrainingFlops | None, peak_flops: float | None):
        self.task_groups = [*sorted({*task_groups}), MIXED]
        self.flops = flops
        self.peak_flops = peak_flops
        self._reset()

    def _reset(self):
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._losses = {group: [0.0, 0] for group in self.task_groups}  # sum over labels, and their number
        self._started = None

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time until each is there counts as waiting."""
        self._started = time.perf_counter()
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._counts["waiting"] += time.perf_counter() - asked
            yield batch

    def add(
        self, counts: dict[str, int], groups: Sequence[str], loss: torch.Tensor, num_items: torch.Tensor | int | None
    ):
        """
        Counts a batch. The loss stays on its device until `collect`.

        Args:
            counts: of `count_batch`.
            groups: task group of each of its samples.
            loss: mean over the labels of the batch, or with `num_items` its part in a mean over so many.
        """
        self._counts["samples"] += len(groups)
        for name, count in counts.items():
            self._counts[name] += count
        group = self._losses[groups[0] if len({*groups}) == 1 and groups[0] in self._losses else MIXED]
        loss = loss.detach().to(_precise(loss.device))
        group[0] = group[0] + loss * (counts["labels"] if num_items is None else num_items)
        group[1] += counts["labels"]

    def on_step_end(self, args, state, control, **kwargs):
        if self._started is not None:
            self._counts["seconds"] += time.perf_counter() - self._started
            self._started = None

    def collect(self, gather, device: torch.device) -> dict[str, float]:
        """
        The values of the logs since the last call; to be called on all processes.

        Args:
            gather: `(N,)` of each process -> `(processes, N)`.
        """
        losses = (float(x) for pair in self._losses.values() for x in pair)
        own = [*self._counts.values(), _peak_memory(device), *losses]
        rows = gather(torch.tensor(own, dtype=_precise(device), device=device))
        rows = rows.reshape(-1, len(own)).cpu()
        self._reset()
        totals = dict(zip(_COUNTS, rows.sum(dim=0).tolist(), strict=False))
        seconds = rows[:, _COUNTS.index("seconds")].max().item()
        if seconds == 0:
            return {}
        logs = {
            "tokens_per_second": totals["tokens"] / seconds,
            "samples_per_second": totals["samples"] / seconds,
            "data_wait": totals["waiting"] / totals["seconds"],
            "peak_memory_gb": rows[:, len(_COUNTS)].max().item() / 2**30,
        }
        if self.flops is not None and self.peak_flops:
            work = self.flops.count(*(totals[name] for name in ("tokens", "labels", "pixels", "media", "squares")))
            logs["mfu"] = work / seconds / (self.peak_flops * len(rows))
        losses = rows[:, len(_COUNTS) + 1 :].sum(dim=0).reshape(-1, 2).tolist()
        for group, (loss, labels) in zip(self.task_groups, losses, strict=True):
            if labels:
                logs[f"loss/{group}"] = loss / labels
        return logs


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # of accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
