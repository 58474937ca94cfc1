"""The recipes: each can be read, its memory is what the plan says, and the one for a CPU runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import CONFIG_MAPPING

from otter_hf import OtterHDConfig
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.kernels import choose_attention
from otter_hf.training.plan import make_plan, meta_model
from otter_hf.training.run import run as main


ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))}
MEMORY = re.compile(
    r"^# Memory per device, computed by the plan: ([\d.]+) (MiB|GiB) \((\d+) devices?, ([\w-]+)\)\.$", re.M
)


def config_of(recipe: str):
    """The configuration of the published model that a recipe starts from."""
    name = yaml.safe_load(RECIPES[recipe].read_text())["model_name_or_path"]
    if name in ("adept/fuyu-8b", "Otter-AI/OtterHD-8B"):
        return OtterHDConfig()
    for card in yaml.safe_load((ROOT / "model_cards" / "facts.yaml").read_text())["models"].values():
        if card["repository"] == name:
            return CONFIG_MAPPING[card["config"]["model_type"]].from_dict(dict(card["config"]))
    raise AssertionError(f"model_cards/facts.yaml has no {name}")


def arguments_of(recipe: str):
    # half precision is for the GPU that the recipe is for
    flags = "--use_cpu True --bf16 False --tf32 False"
    if recipe == "otter_cpu_tiny":  # starts from a folder that is made first
        flags += " --model_name_or_path tiny/otter"
    parsed = parse_arguments([str(RECIPES[recipe]), *flags.split()])
    parsed[2].bf16 = yaml.safe_load(RECIPES[recipe].read_text()).get("bf16", False)
    return parsed


def plan_of(recipe: str, world_size: int, sharding: str, config=None):
    parsed = arguments_of(recipe)
    config = config or config_of(recipe)
    model = meta_model(parsed[0], config, choose_attention(config, *parsed), autocast=parsed[2].bf16)
    frames = parsed[1].num_frames if recipe == "otter_video" else 1
    return make_plan(model, *parsed, world_size=world_size, sharding=sharding, frames=frames)


@pytest.mark.parametrize("recipe", RECIPES)
def test_head_of_the_recipe(recipe):
    text = RECIPES[recipe].read_text()
    head = text[: text.index("\n\n")]
    assert f"examples/recipes/{recipe}.yaml" in head  # the launch line
    assert "# Hardware: " in head
    assert re.search("[Rr]un so far: |Not run", head)
    assert len(MEMORY.findall(head)) == 1
    for config in re.findall(r"examples/accelerate_configs/\w+\.yaml|examples/\w+\.py", head):
        assert (ROOT / config).is_file(), config
    model_args, _, training_args = arguments_of(recipe)
    assert model_args.model_name_or_path
    assert training_args.output_dir.startswith("out/")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "otter_cpu_tiny"])
def test_memory_in_the_head_is_that_of_the_plan(recipe):
    (size, unit, devices, sharding), *_ = MEMORY.findall(RECIPES[recipe].read_text())
    memory = sum(plan_of(recipe, int(devices), sharding.replace("unshared", "none")).memory.values())
    assert unit == "GiB"
    assert float(size) == pytest.approx(memory / 2**30, abs=0.06)


def test_the_recipe_for_a_cpu_runs(ragged):
    path, data = RECIPES["otter_cpu_tiny"], str(ragged / "data.yaml")
    flags = f"--model_name_or_path {ragged / 'base'} --output_dir {ragged / 'out'} --train_mixture {data}"
    main([str(path), *flags.split(), "--eval_mixture", data, "--max_steps", "4", "--logging_steps", "1"])
    state = json.loads((ragged / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert (ragged / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="would load the model")
def test_four_bits_need_bitsandbytes(ragged):
    flags = f"--model_name_or_path {ragged / 'base'} --output_dir {ragged / 'out'} --use_cpu True --bf16 False"
    flags += f" --train_mixture {ragged / 'data.yaml'} --lora_target_modules q_proj"
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes"):
        main([str(RECIPES["otter_qlora"]), *flags.split()])
    assert not (ragged / "out").exists()
