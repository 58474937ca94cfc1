"""Next-token loss that computes logits only where a label asks for them, a bounded number at a time."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_liger_kernel_available
from transformers.utils.import_utils import is_torchdynamo_compiling

from .host_reads import positions_with_labels


# logits held at once: 256 MiB in float32, whatever the vocabulary
MAX_LOGITS = 2**26


def scale_logits(logits: torch.Tensor, scale: float | None = None, softcap: float | None = None) -> torch.Tensor:
    """`softcap * tanh(scale * logits / softcap)`; None leaves a step out."""
    if scale is not None:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def supervised_loss(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    target_count: int | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    The same number and gradients as transformers' causal-LM loss on the logits of `lm_head`.

    Positions without a label are left out (while compiling, when their number is unknown, they are not), and more
    than `MAX_LOGITS` logits are never held: chunks of positions are recomputed in the backward pass. With Liger
    installed its fused kernel takes over on CUDA (https://huggingface.co/papers/2410.10989); on a CPU a plain output
    layer is run once, and the gradients come with the loss, as that kernel does it.

    Args:
        lm_head: `(N, hidden)` -> `(N, vocab)`.
        hidden_states: `(B, L, hidden)`.
        labels: `(B, L)` int64, not shifted.
        vocab_size: width of the logits.
        scale, softcap: see `scale_logits`.
        num_items_in_batch: divides the summed loss; by default the number of labels.
        ignore_index: label of positions that are left out.
        shift_labels: `(B, L)` int64, labels already shifted, in place of `labels`.
        target_count: how many labels there are, see `known_on_host`; by default they are counted on the device.

    Returns:
        float32 scalar; 0 where transformers has nan, for a batch without any label.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(hidden_states.device)  # (B*L,)
    hidden_states = hidden_states.flatten(0, -2)  # (B*L, hidden)
    if not is_torchdynamo_compiling():
        supervised = positions_with_labels(targets, target_count, ignore_index)  # (N,)
        targets, hidden_states = targets[supervised], hidden_states[supervised]

    if scale is None and _fused_kernel_applies(lm_head, hidden_states, vocab_size):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=ignore_index, softcap=softcap)
        loss = fused(lm_head.weight, hidden_states, targets)
    elif softcap is None and _runs_once(lm_head, hidden_states, vocab_size):
        loss = _LinearCrossEntropy.apply(hidden_states, lm_head.weight, targets, scale or 1.0, ignore_index)
    else:

        def chunk_loss(hidden_states, targets):
            logits = scale_logits(lm_head(hidden_states), scale, softcap).float()  # (c, vocab)
            targets = targets.to(logits.device)  # where the head is; tied to the embeddings, it may be on another
            return nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")

        size = max(1, MAX_LOGITS // vocab_size)
        chunks = list(zip(hidden_states.split(size), targets.split(size), strict=True))
        if _gathers_on_call(lm_head):
            # each call is a collective: all ranks make as many as the one with the most labels
            count = torch.tensor(len(chunks), device=hidden_states.device)
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
            chunks += [(hidden_states[:0], targets[:0])] * (int(count) - len(chunks))
        if len(chunks) == 1:
            loss = chunk_loss(*chunks[0])
        else:
            loss = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


class _LinearCrossEntropy(torch.autograd.Function):
    """
    Summed cross-entropy of a linear layer's logits, a chunk of positions at a time, each of which becomes its own
    gradient in place: logits are neither kept for the backward pass nor computed again.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, targets, scale: float, ignore_index: int):
        """`hidden_states (N, hidden)`, `weight (vocab, hidden)`, `targets (N,)` -> float32 scalar."""
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        # a quarter of what may be held, as four tensors of this size come and go
        size = max(1, MAX_LOGITS // 4 // len(weight))
        for start in range(0, len(hidden_states), size):
            rows, wanted = hidden_states[start : start + size], targets[start : start + size, None]
            counts = wanted != ignore_index
            wanted = wanted.where(counts, 0)
            logits = (rows @ weight.T).float().mul_(scale) if scale != 1 else (rows @ weight.T).float()  # (c, vocab)
            largest, chosen = logits.amax(1, keepdim=True), logits.gather(1, wanted)
            gradient = logits.softmax(1)
            # log of the sum of exponentials, from the largest probability, which is no smaller than 1 / vocab
            sum_of_all = largest - gradient.amax(1, keepdim=True).log()
            total += ((sum_of_all - chosen) * counts).sum()
            if not (wants_hidden or wants_weight):
                continue
            del logits
            gradient.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
            gradient, counts = gradient.to(weight.dtype), counts.to(weight.dtype)
            if wants_hidden:
                torch.mm(gradient, weight, out=of_hidden[start : start + size]).mul_(counts)
            if wants_weight:
                of_weight.addmm_(gradient.T, rows * counts, alpha=scale)
        if wants_hidden and scale != 1:
            of_hidden *= scale
        ctx.gradients = of_hidden, of_weight
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        scaled = [None if own is None else own * gradient.to(own.dtype) for own in ctx.gradients]
        return *scaled, None, None, None


def _runs_once(lm_head: nn.Module, hidden_states: torch.Tensor, vocab_size: int) -> bool:
    """
    Whether the loss takes the weight of the output layer itself: plain, whole, in one precision, and on a CPU, where
    memory for its gradient is no matter, and time is.
    """
    return (
        hidden_states.device.type == "cpu"
        and not is_torchdynamo_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(lm_head) is nn.Linear
        and lm_head.bias is None
        and type(lm_head.weight) is nn.Parameter  # FSDP's are DTensors
        and lm_head.weight.device == hidden_states.device
        and lm_head.weight.dtype == hidden_states.dtype
        and lm_head.weight.shape == (vocab_size, hidden_states.shape[-1])  # sharded by ZeRO-3 it is empty
        and not any((lm_head._forward_hooks, lm_head._forward_pre_hooks, lm_head._backward_hooks))
    )


def _gathers_on_call(lm_head: nn.Module) -> bool:
    """Whether the layer's weight is put together from all ranks whenever it is called: ZeRO-3 and FSDP2."""
    if is_torchdynamo_compiling() or not torch.distributed.is_available():  # some builds for Windows have not
        return False
    from torch.distributed.fsdp import FSDPModule

    return hasattr(lm_head.weight, "ds_id") or isinstance(lm_head, FSDPModule)


def _fused_kernel_applies(lm_head: nn.Module, hidden_states: torch.Tensor, vocab_size: int) -> bool:
    """Whether Liger's kernel may read the weight directly: a plain layer, whole on the device of its input."""
    return (
        hidden_states.is_cuda
        and is_liger_kernel_available()
        and type(lm_head) is nn.Linear
        and lm_head.weight.device == hidden_states.device
        and lm_head.weight.shape == (vocab_size, hidden_states.shape[-1])  # sharded by ZeRO-3 it is empty
        and hidden_states.shape[0] > 0
    )
