"""Writes the tables of docs/planning.md: `python docs/planning.py` (about 20 seconds; loads no weights).

Formulas and cards are those of `otter-hf train --plan`; what is assumed beside them stands here.
"""

import math
from pathlib import Path

import yaml
from transformers import CONFIG_MAPPING

from otter_hf import OtterHDConfig
from otter_hf.conversion.memory import gibibytes
from otter_hf.data.pretraining import num_batches
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.devices import find_device
from otter_hf.training.kernels import choose_attention
from otter_hf.training.outlook import network_bytes, step_seconds
from otter_hf.training.plan import SHARDINGS, make_plan, meta_model


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "planning.md"
CARD, MFU, WORKERS = "h100-80gb", 0.4, 4
# instructions of MIMIC-IT (https://huggingface.co/papers/2306.05425)
MIMICIT = 2_800_000
# OpenFlamingo-9B saw 60 million documents and 120 million pairs (https://huggingface.co/papers/2308.01390); samples of
# a batch on each device, tokens and pictures of a sample at most, and bytes of a sample in its shard: a picture of 40
# kB, in base64 in the documents
SETS = {
    "documents": {"samples": 60_000_000, "batch": 16, "tokens": 256, "pictures": 5, "bytes": 5 * 40_000 * 4 // 3},
    "pairs": {"samples": 120_000_000, "batch": 32, "tokens": 32, "pictures": 1, "bytes": 40_000},
}
RECIPES = {
    "otter_image_mpt7b": ((1, 8), (16, 8)),
    "otter_lora_24gb": ((1, 1), (1, 8)),
    "otter_qlora": ((1, 1), (1, 8)),
    "otterhd_full": ((1, 8), (16, 8)),
    "otterhd_lora": ((1, 1), (1, 8)),
    "otterhd_qlora": ((1, 1), (1, 8)),
}


def config_of(repository: str):
    """The configuration of a published model, from model_cards/facts.yaml."""
    if repository in ("adept/fuyu-8b", "Otter-AI/OtterHD-8B"):
        return OtterHDConfig()
    cards = yaml.safe_load((ROOT / "model_cards" / "facts.yaml").read_text(encoding="utf-8"))["models"].values()
    facts = next(card["config"] for card in cards if card["repository"] == repository)
    return CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts))


def planned(arguments: list[str], config, nodes: int, gpus: int, sharding: str, num_samples: int | None = None):
    """The plan, its model on the meta device, and the arguments."""
    machine = ["--plan", "--plan_device", CARD, "--nodes", str(nodes), "--gpus", str(gpus), "--mfu", str(MFU)]
    parsed = parse_arguments([*arguments, *machine, "--tf32", "False"])
    parsed[2].bf16 = True
    model = meta_model(parsed[0], config, choose_attention(config, *parsed), autocast=True)
    plan = make_plan(model, *parsed, num_samples=num_samples, world_size=nodes * gpus, sharding=sharding)
    return plan, model, parsed


def seconds_of(plan, one: dict, devices: int) -> float:
    """Of the batches of one set: its pictures are media of one frame each."""
    samples, pictures = one["batch"] * devices, one["batch"] * devices * one["pictures"]
    work = plan.flops.count(
        tokens=samples * one["tokens"],
        labels=samples * one["tokens"],
        pixels=pictures * 224 * 224,
        media=pictures,
        squares=samples * one["tokens"] ** 2,
    )
    return work / (devices * find_device(CARD).teraflops * 1e12 * MFU)


def table(*columns: str) -> list[str]:
    return [*row(*columns), *row(*["---", *["---:"] * (len(columns) - 1)])]


def row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def size(count: float) -> str:
    return gibibytes(count).replace(" GiB", "").replace(" MiB", " MiB")


def of_recipes() -> list[str]:
    lines = table(
        *("recipe", "devices", "sharding", "states", "with activations", "sent a step", "steps", "s a step", "hours"),
        "samples/s of a device",
    )
    for recipe, machines in RECIPES.items():
        path = ROOT / "examples" / "recipes" / f"{recipe}.yaml"
        config = config_of(yaml.safe_load(path.read_text(encoding="utf-8"))["model_name_or_path"])
        for nodes, gpus in machines:
            sharding = "zero3" if "full" in recipe or "image" in recipe else "none"
            plan, model, parsed = planned([str(path)], config, nodes, gpus, sharding, MIMICIT)
            states = sum(plan.memory[part] for part in ("weights", "gradients", "optimizer"))
            sent = network_bytes(model, parsed[0], parsed[2], plan.world_size, sharding)
            seconds = step_seconds(plan, model, *parsed[1:])
            lines += row(
                *(f"`{recipe}`", f"{nodes} x {gpus}", sharding, size(states), size(sum(plan.memory.values()))),
                *(size(sent) if sent else "-", f"{plan.steps:,}", f"{seconds:.3g}"),
                f"{plan.steps * seconds / 3600:,.3g}",
                f"{plan.samples_per_step / seconds / plan.world_size:.3g}",
            )
    return lines


def of_pretraining() -> list[str]:
    config = config_of("luodian/OTTER-MPT7B-Init")
    freeze = ["--freeze", "vision", "language", "--activation_checkpointing", "True", "--dtype", "float32"]
    needed = ["--model_name_or_path", "x", "--train_mixture", "x", "--output_dir", "x"]
    lines = table(
        "devices", "steps", "s a step", "days", "samples/s", "data read", "by a device", "shards of each set"
    )
    memory = table("devices", "sharding", "states", "with activations", "sent a step", "fits")
    for nodes, gpus in ((1, 8), (8, 8), (16, 8)):
        devices, seconds, per_batch = nodes * gpus, 0.0, 0
        for one in SETS.values():
            own = ["--max_length", str(one["tokens"]), "--per_device_train_batch_size", str(one["batch"])]
            plan, model, parsed = planned([*needed, *freeze, *own], config, nodes, gpus, "none")
            seconds += seconds_of(plan, one, devices)
            per_batch = max(per_batch, plan.memory["activations"] + plan.memory["logits"])
        steps = max(num_batches(one["samples"], one["batch"], devices, WORKERS) for one in SETS.values())
        samples = sum(one["batch"] for one in SETS.values()) * devices
        read = sum(one["batch"] * one["bytes"] for one in SETS.values()) * devices / seconds
        lines += row(
            *(f"{nodes} x {gpus}", f"{steps:,}", f"{seconds:.3g}", f"{steps * seconds / 86400:.3g}"),
            *(f"{samples / seconds:,.0f}", f"{read / 1e6:,.0f} MB/s", f"{read / devices / 1e6:.3g} MB/s"),
            f"at least {devices * WORKERS:,}",
        )
        for sharding in SHARDINGS:
            plan, model, parsed = planned([*needed, *freeze, *own], config, nodes, gpus, sharding)
            states = sum(plan.memory[part] for part in ("weights", "gradients", "optimizer"))
            sent = network_bytes(model, parsed[0], parsed[2], devices, sharding)
            memory += row(
                *(f"{nodes} x {gpus}", sharding, size(states), size(states + per_batch), size(sent)),
                "yes" if states + per_batch < (find_device(CARD).gibibytes - 1) * 2**30 else "no",
            )
    return [*lines, "", *memory]


def of_shards() -> list[str]:
    lines = table("set", "samples", "all of it", "shards of 10,000 samples", "each")
    for name, one in SETS.items():
        total = one["samples"] * one["bytes"]
        lines += row(
            *(name, f"{one['samples']:,}", f"{total / 1e12:.3g} TB", f"{math.ceil(one['samples'] / 10_000):,}"),
            f"{10_000 * one['bytes'] / 1e9:.2g} GB",
        )
    return lines


TABLES = {"recipes": of_recipes, "pretraining": of_pretraining, "shards": of_shards}


def filled(page: str) -> str:
    """The page with its tables computed anew."""
    for name, rows in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = "\n".join([before + start, *rows(), end + rest.split(end)[1]])
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
