"""Section `equal`: the card computes what the CPU does, and every attention implementation what eager does."""

import copy
import functools
from collections.abc import Iterator

import torch
from _gpu_models import Machine, build, packed, padded, samples, small

from otter_hf.models.attention_choice import fits, why_not


FAMILIES = ("otter-llama", "otter-mpt", "flamingo", "otterhd")
IMPLEMENTATIONS = (
    "sdpa",
    "varlen_sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
LAYOUTS = ("left padded", "right padded", "packed")


def rows(machine: Machine) -> Iterator:
    """Pairs of a workload and the function that measures it."""
    for family in FAMILIES:
        yield f"{family}: float32 and bfloat16 against the CPU", functools.partial(card_against_cpu, family, machine)
        for name in IMPLEMENTATIONS:
            if name != "flex_attention":
                yield _row(family, name, machine)
        yield f"{family}: cached and beams against no cache", functools.partial(generation, family, machine)


def compiled_rows(machine: Machine) -> Iterator:
    """The same for what is compiled on a card, which takes long: a static cache, flex attention."""
    for family in FAMILIES:
        yield f"{family}: static against no cache", functools.partial(generation, family, machine, static=True)
    for family in FAMILIES:
        yield _row(family, "flex_attention", machine)


def _row(family: str, name: str, machine: Machine) -> tuple:
    function = functools.partial(against_eager, family, name, machine)
    return f"{family}: {name} against eager, forward and backward", function


def batches(config, machine: Machine) -> dict[str, dict]:
    """Three samples with several images, one image and none, in every layout."""
    texts = samples(config, machine, [48, 31, 17], [3, 1, 0])
    return {
        "left padded": padded(config, texts, machine, side="left"),
        "right padded": padded(config, texts, machine),
        "packed": packed(config, texts, machine),
    }


def run(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all real tokens `(N, V)` and the gradients in one row, both in float32 on the CPU."""
    model.zero_grad(set_to_none=True)
    outputs = model(**batch, use_cache=False)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    outputs.loss.backward()
    gradients = [p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return outputs.logits[real].detach().float().cpu(), torch.cat(gradients)


def difference(values: torch.Tensor, reference: torch.Tensor) -> float:
    """The root mean square of the difference, as a share of that of the reference."""
    return ((values - reference).square().mean() / reference.square().mean()).sqrt().item()


def card_against_cpu(family: str, machine: Machine) -> dict:
    cpu = Machine(torch.device("cpu"), machine.tiny)
    config = small(family, machine.tiny)
    reference = build(config, cpu, torch.float32, "eager")
    model = copy.deepcopy(reference).to(machine.device)
    batch, batch_there = (batches(config, one)["right padded"] for one in (cpu, machine))
    logits, gradients = run(reference, batch)
    whole = [
        difference(ours, theirs) for ours, theirs in zip(run(model, batch_there), (logits, gradients), strict=True)
    ]
    half = [
        difference(ours, theirs)
        for ours, theirs in zip(run(model.bfloat16(), batch_there), (logits, gradients), strict=True)
    ]
    return {
        "unit": "relative difference",
        "float32": {"logits": whole[0], "gradients": whole[1]},
        "bfloat16": {"logits": half[0], "gradients": half[1]},
        # a number in bfloat16 is off by up to 2^-9, and some hundred of them are added up on the way
        "equal": max(whole) < 1e-4 and max(half) < 0.05,
    }


def against_eager(family: str, name: str, machine: Machine) -> dict:
    """Errors against eager attention in float32, beside those of eager attention in the same precision."""
    config = small(family, machine.tiny)
    dtype = torch.bfloat16 if name.startswith("flash") else torch.float32
    if name.startswith("flash"):
        reason = why_not(name, machine.device, dtype)
        if reason is None and not fits(name, config):
            reason = "cannot compute ALiBi"
        if reason is not None:
            return {"left_out": reason}
    if name == "flex_attention" and family == "otterhd":
        return {"left_out": "Persimmon has none"}
    if name == "flex_attention" and not machine.on_card:
        return {"left_out": "has no backward pass on a CPU"}
    half = name in ("sdpa", "varlen_sdpa") and machine.on_card  # also through the fused kernels of torch
    result: dict = {"unit": "relative difference", "equal": True}
    for precision in [dtype] + ([torch.bfloat16] if half else []):
        exact = build(config, machine, torch.float32, "eager")
        eager = copy.deepcopy(exact).to(precision)
        model = copy.deepcopy(eager)
        model.set_attn_implementation(name)
        errors = {}
        for layout, batch in batches(config, machine).items():
            reference = run(exact, batch)
            errors[layout] = [
                [difference(values, expected) for values, expected in zip(run(one, batch), reference, strict=True)]
                for one in (model, eager)
            ]
            result["equal"] &= all(ours <= 2 * theirs + 1e-4 for ours, theirs in zip(*errors[layout], strict=True))
        result[str(precision).removeprefix("torch.")] = {
            layout: {"ours": {"logits": ours[0], "gradients": ours[1]}, "eager": {"logits": e[0], "gradients": e[1]}}
            for layout, (ours, e) in errors.items()
        }
    return result


@torch.no_grad()
def generation(family: str, machine: Machine, static: bool = False) -> dict:
    """Whether the same tokens come out of every cache, in float32."""
    config = small(family, machine.tiny)
    model = build(config, machine, torch.float32, "sdpa")
    batch = padded(config, samples(config, machine, [24, 17], [2, 1]), machine, side="left", labels=False)
    count = 4 if machine.tiny else 16
    settings = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 5}
    settings["suppress_tokens"] = [config.image_token_id]

    def same(**others) -> bool:
        expected = model.generate(**batch, **settings, **{"num_beams": others.get("num_beams", 1)}, use_cache=False)
        return torch.equal(model.generate(**batch, **settings, **others), expected)

    if static:
        found = {"static": same(cache_implementation="static")}
    else:
        found = {"cached": same(), "beams": same(num_beams=2)}
    return {"unit": "same tokens", **found, "equal": all(found.values())}
