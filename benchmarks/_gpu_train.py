"""Section `train`: the steps of our recipes, their speed, and their memory beside what the plan says."""

import functools
from collections.abc import Iterator

import torch
from _gpu_models import Machine, build, is_otterhd, packed, padded, published, samples


# recipe: model, arguments of the training as a recipe has them, samples in a step
RECIPES = {
    "otter-mpt, frozen vision and language": ("otter-mpt", ["--freeze", "vision", "language"], 8),
    "otter-mpt, LoRA": (
        "otter-mpt",
        "--lora True --lora_r 16 --lora_target_modules Wqkv out_proj --lora_train_groups perceiver".split(),
        8,
    ),
    "otterhd, LoRA": (
        "otterhd",
        "--lora True --lora_r 64 --lora_target_modules query_key_value dense dense_h_to_4h dense_4h_to_h".split(),
        4,
    ),
}
# lengths of a mixed batch, as instruction data has them, and images of OtterHD of 448 to 768 pixels a side
LENGTHS = (96, 640, 160, 128, 224, 96, 384, 192)
SIDES = (15, 17, 26, 15)


def rows(machine: Machine) -> Iterator:
    """Pairs of a workload and the function that measures it."""
    for recipe, (name, _, _) in RECIPES.items():
        for layout in ("packed", "padded"):
            yield f"{recipe}: {layout}", functools.partial(training, recipe, layout, None, machine)
        yield (
            f"{recipe}: packed, varlen_sdpa",
            functools.partial(training, recipe, "packed", "varlen_sdpa", machine),
        )
        if name == "otterhd":
            for attention in ("sdpa", "eager"):
                yield (
                    f"{recipe}: transformers' Fuyu, padded, {attention}",
                    functools.partial(training, recipe, "padded", attention, machine, peer=True),
                )
    yield "otter-mpt, QLoRA: packed", functools.partial(four_bits, machine)
    for name, attention in (("", None), (", varlen_sdpa", "varlen_sdpa")):
        yield f"otterhd, LoRA: profile of a packed step{name}", functools.partial(profile, attention, machine)


def four_bits(machine: Machine) -> dict:
    """bitsandbytes quantises weights as they are read from a folder, and 7B of them are not brought along."""
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        return {"left_out": "bitsandbytes is not installed"}
    return {"left_out": "needs a folder with the weights: measure it with otter-hf train and otter_qlora.yaml"}


def parse(flags: list[str], count: int, max_length: int, attention: str | None, machine: Machine) -> tuple:
    """The arguments of a training, and their plan's view of the machine."""
    from otter_hf.training.arguments import parse_arguments

    common = ["--model_name_or_path", "published/shape", "--train_mixture", "none.yaml", "--output_dir", "none"]
    common += ["--dtype", "bfloat16", "--activation_checkpointing", "True", "--report_to", "none"]
    common += ["--per_device_train_batch_size", str(count), "--max_length", str(max_length)]
    common += [] if machine.on_card else ["--use_cpu", "True"]
    common += ["--attn_implementation", attention] if attention else []
    parsed = parse_arguments([*common, *flags])
    parsed[2].bf16 = True  # as on a card, where it is asked for
    return parsed


def prepare(recipe: str, layout: str, attention: str | None, machine: Machine, peer: bool = False) -> tuple:
    """Model, batch, plan and number of real tokens of a recipe; of a `peer` those of transformers' Fuyu."""
    from otter_hf.training.freezing import freeze
    from otter_hf.training.kernels import choose_attention
    from otter_hf.training.lora import add_lora
    from otter_hf.training.plan import make_plan, meta_model

    name, flags, count = RECIPES[recipe]
    config = published("fuyu" if peer else name, machine.tiny)
    lengths, media, side = [*LENGTHS[:count]], [1] * count, 1
    if machine.tiny:
        lengths, side = [24, 48, 16, 32], 2
        media = [1] * 4
    texts = samples(config, machine, lengths, media, side)
    if is_otterhd(config) and not machine.tiny:
        texts = [samples(config, machine, [86 + s * s], [1], s)[0] for s in SIDES]
    lengths = [len(text["input_ids"]) for text in texts]
    batch = (packed if layout == "packed" else padded)(config, texts, machine)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    parsed = parse(flags, len(texts), max(lengths), attention, machine)
    model_args, data_args, training_args = parsed
    data_args.packing = layout == "packed"
    chosen = choose_attention(config, *parsed)
    plan = None
    if not peer:
        plan = make_plan(meta_model(model_args, config, chosen, autocast=True), *parsed, world_size=1, sharding="none")
    model = build(config, machine, torch.bfloat16, chosen)
    if model_args.lora:
        model = add_lora(model, model_args, training_args)
        core = model.get_base_model()
    else:
        core = model
        freeze(model, model_args.freeze)
    core.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(), batch, plan, sum(lengths), chosen


def make_step(model, batch: dict, machine: Machine):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step():
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(recipe: str, layout: str, attention: str | None, machine: Machine, peer: bool = False) -> dict:
    machine.free()
    model, batch, plan, tokens, chosen = prepare(recipe, layout, attention, machine, peer)
    step = make_step(model, batch, machine)
    step()  # the optimizer's state is made here
    peak = machine.peak_bytes(step)
    seconds = machine.seconds(step)
    row = {
        "unit": "real tokens per second",
        "peer" if peer else "ours": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        "real_tokens": tokens,
        "places": batch["input_ids"].numel(),
        "attention": chosen or "sdpa",
    }
    if plan is not None:
        labels = int((batch["labels"][:, 1:] != -100).sum())
        media = batch["pixel_values"].shape[0] * batch["pixel_values"].shape[1] if not _flat(batch) else 0
        lengths = batch["cu_seq_lens_q"].diff() if layout == "packed" else batch["attention_mask"].sum(dim=1)
        pixels = 0 if _flat(batch) else media * batch["pixel_values"].shape[-1] ** 2
        work = plan.flops.count(tokens, labels, pixels, media, int((lengths.long() ** 2).sum()))
        row["mfu"] = round(work / seconds / machine.peak_flops, 4)
        row["planned_bytes"] = sum(plan.memory.values())
        if peak is not None:
            row["planned_over_measured"] = round(row["planned_bytes"] / peak, 3)
    row["peak_bytes"] = peak
    return row


def _flat(batch: dict) -> bool:
    """Whether the images are OtterHD's patches."""
    return batch["pixel_values"].ndim == 2


def profile(attention: str | None, machine: Machine) -> dict:
    """The operations that a packed step of OtterHD spends its time on, the longest first, on device and host."""
    model, batch, _, _, _ = prepare("otterhd, LoRA", "packed", attention, machine)
    step = make_step(model, batch, machine)
    step()
    machine.wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if machine.on_card else []
    with torch.profiler.profile(activities=activities) as trace:
        step()
        machine.wait()
    events = trace.key_averages()
    row: dict = {"unit": "share of the time"}
    sides = {"host": "self_cpu_time_total"} | ({"device": "self_device_time_total"} if machine.on_card else {})
    for side, field in sides.items():
        spent = {event.key: getattr(event, field) for event in events}
        total = max(sum(spent.values()), 1)
        row[f"{side}_ms"] = round(total / 1000, 1)
        row[side] = {name: round(spent[name] / total, 4) for name in sorted(spent, key=spent.get, reverse=True)[:12]}
    return row
