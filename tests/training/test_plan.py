"""What the plan says of a training, against the training."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.tiny_flamingo import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from otter_hf import OtterHDConfig
from otter_hf.models.flamingo.layers_flamingo import CrossAttention
from otter_hf.testing.otterhd import tiny_model, tiny_processor
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.flops import count_training_flops
from otter_hf.training.freezing import freeze
from otter_hf.training.kernels import choose_attention, use_liger_kernels
from otter_hf.training.outlook import network_bytes, outlook, step_seconds
from otter_hf.training.plan import SHARDINGS, make_plan, meta_model
from otter_hf.training.run import run as main


@pytest.fixture
def arguments(model, tmp_path):
    model.save_pretrained(tmp_path / "base")

    def parse(flags=""):
        base = f"--model_name_or_path {tmp_path / 'base'} --train_mixture t.yaml --output_dir out --use_cpu True"
        return parse_arguments(f"{base} {flags}".split())

    return parse


def plan_of(arguments, **kwargs):
    model_args = arguments[0]
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
    return make_plan(meta_model(model_args, config), *arguments, **kwargs)


def test_parameters_and_memory_are_those_of_the_model(arguments, model):
    flags = "--freeze vision language --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --max_length 64"
    plan = plan_of(arguments(flags), num_samples=20, world_size=1)
    freeze(model, ["vision", "language"])
    trained = model.num_parameters(only_trainable=True)
    assert sum(total for total, _ in plan.groups.values()) == model.num_parameters()
    assert sum(count for _, count in plan.groups.values()) == trained
    assert plan.groups["language"][1] == plan.groups["vision"][1] == 0
    assert plan.memory["weights"] == 4 * model.num_parameters()
    assert plan.memory["gradients"] == 4 * trained
    assert plan.memory["optimizer"] == 8 * trained
    assert (plan.samples_per_step, plan.tokens_per_step) == (6, 384)
    assert plan.steps == 12  # 10 batches, 4 steps an epoch, 3 epochs
    assert (plan.dtype, plan.compute_dtype, plan.sharding) == ("float32", "float32", "none")


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),
    [("none", 4, 4, 8), ("zero1", 2, 2, 12 / 8), ("zero2", 2, 2 / 8, 12 / 8), ("zero3", 2 / 8, 2 / 8, 12 / 8)]
    + [("fsdp", 4 / 8, 4 / 8, 8 / 8)],
)
def test_memory_of_shared_states(arguments, model, sharding, weights, gradients, optimizer):
    parsed = arguments()
    parsed[2].bf16 = True  # as on a GPU: the argument itself is refused on a CPU without bfloat16
    plan = plan_of(parsed, world_size=8, sharding=sharding)
    count = sum(total for total, _ in plan.groups.values())
    trained = sum(trained for _, trained in plan.groups.values())
    expected = [int(count * weights), int(trained * gradients), int(trained * optimizer)]
    assert [plan.memory[name] for name in ("weights", "gradients", "optimizer")] == expected
    assert plan.compute_dtype == "bfloat16"


def test_low_rank_updates_and_four_bits(arguments):
    lora = "--lora True --lora_target_modules q_proj v_proj --lora_train_groups perceiver --lora_r 4"
    plan = plan_of(arguments(lora))
    # q_proj and v_proj of 4 layers, 32 x 32, rank 4; the resampler in full beside a frozen copy
    assert plan.groups["language"][1] == 4 * 2 * 4 * (32 + 32)
    assert plan.groups["perceiver"][1] * 2 == plan.groups["perceiver"][0]
    assert plan.groups["cross_attention"][1] == 0
    in_4_bits = plan_of(arguments(f"{lora} --load_in_4bit True"))
    assert in_4_bits.dtype == "4 bits"
    assert in_4_bits.memory["weights"] < plan.memory["weights"]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_moments_of_the_optimizer(arguments, optim):
    plan = plan_of(arguments(f"--optim {optim}"))
    assert plan.memory["optimizer"] == (2 * plan.memory["gradients"] if optim == "adamw_torch" else 0)


@pytest.mark.parametrize("frozen", ["vision", "vision language"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(arguments, model, frozen, checkpointing):
    flags = f"--freeze {frozen} --per_device_train_batch_size 2 --max_length 64"
    plan = plan_of(arguments(f"{flags} --activation_checkpointing {checkpointing}"))
    freeze(model, frozen.split())
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.randint(3, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = model.config.image_token_id
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids, pixel_values=torch.randn(2, 1, 3, 28, 28))
    measured = sum(size for size, _ in kept.values())
    logits = 2 * 4 * 2 * 64 * model.config.text_config.vocab_size
    assert plan.memory["logits"] == logits
    if checkpointing:  # the plan has one layer's activations on top, which the backward pass makes again
        assert 0.5 * measured < plan.memory["activations"] < 4 * measured
    else:
        assert 0.7 * measured < plan.memory["activations"] + logits < 1.4 * measured


@pytest.mark.parametrize(
    "frozen",
    ["", "vision language embeddings", "vision perceiver cross_attention", "language embeddings cross_attention"]
    + ["vision perceiver language embeddings"],
)
def test_flops_are_those_torch_counts(model, frozen):
    """Up to a few per cent: torch leaves out nothing that matters here, nor do we a pass that is not made."""
    from torch.utils.flop_counter import FlopCounterMode

    freeze(model, frozen.split())
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model.config)
    freeze(empty, frozen.split())
    flops = count_training_flops(empty)
    model.set_attn_implementation("eager")  # counts its multiplications like any other, the future included
    ids = torch.randint(3, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 1] = model.config.image_token_id
    pixels = torch.randn(2, 1, 3, 28, 28)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, pixel_values=pixels).loss.backward()
    expected = flops.count(tokens=128, labels=126, pixels=2 * 28 * 28, media=2, squares=2 * 2 * 64**2)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_frozen_parts_take_fewer_operations(model):
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model.config)
        everything = count_training_flops(empty)
        freeze(empty, ["vision", "language"])
        some = count_training_flops(empty)
    assert some.per_pixel < everything.per_pixel
    assert some.per_medium == everything.per_medium
    assert 2 / 3 < some.per_token / everything.per_token < 1
    assert some.per_label == everything.per_label


def test_layers_that_no_gradient_reaches_are_read_once(model):
    """By hand: of four layers, every second with a gated block, the lowest is not reached."""
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model.config)
    freeze(empty, ["vision", "perceiver", "language", "embeddings"])
    layers = empty.model.decoder_layers
    assert [layer.gated_cross_attn_layer is not None for layer in layers] == [False, True, False, True]
    everywhere = count_training_flops(empty)
    lowest = 2 * sum(m.weight.numel() for m in layers[0].modules() if isinstance(m, torch.nn.Linear))
    square = everywhere.per_square // (3 * 4 - 2)
    kept = count_training_flops(empty, cache_text_states=True, media_store=True)
    assert everywhere.per_token - kept.per_token == lowest
    assert everywhere.per_square - kept.per_square == square
    assert kept.per_pixel == 0 < kept.per_medium < everywhere.per_medium
    empty.get_input_embeddings().weight.requires_grad_(True)
    reached = count_training_flops(empty, cache_text_states=True)  # which is refused: nothing is kept
    assert reached.per_token - everywhere.per_token == lowest
    assert reached.per_square == 3 * 4 * square


def test_flops_of_a_plan_are_without_what_is_kept(arguments):
    flags = "--freeze vision language embeddings --packing False"
    plain, kept = (plan_of(arguments(f"{flags} {more}")).flops for more in ("", "--cache_text_states True"))
    assert kept.per_token < plain.per_token and kept.per_pixel == plain.per_pixel
    stored = plan_of(arguments(f"{flags} --media_store store")).flops
    # the tower alone: the resampler is trained, and reads what is stored
    assert 0 < stored.per_pixel < plain.per_pixel
    assert (stored.per_token, stored.per_medium) == (plain.per_token, plain.per_medium)


def test_groups_that_lora_trains_whole_count_once(arguments):
    """Beside each stands a frozen copy."""
    flags = "--lora True --lora_target_modules v_proj --lora_r 1 --lora_train_groups"
    without = plan_of(arguments(flags.removesuffix(" --lora_train_groups"))).flops
    trained = plan_of(arguments(f"{flags} cross_attention")).flops
    # forward and input are counted in both, the weights and the media's keys in the latter alone
    assert 1 < trained.per_token / without.per_token < 1.5
    assert without.per_medium < trained.per_medium < 2 * without.per_medium


def test_plan_of_otterhd(tmp_path):
    processor = tiny_processor()
    model = tiny_model(processor)
    model.save_pretrained(tmp_path / "base")
    flags = f"--model_name_or_path {tmp_path / 'base'} --train_mixture t.yaml --use_cpu True --output_dir out"
    plan = plan_of(parse_arguments(flags.split()))
    assert plan.memory["weights"] == 4 * model.num_parameters()
    assert plan.attention == {"language": "sdpa"}
    assert plan.flops.per_pixel == plan.flops.per_medium == 0


def plan_flags(flags, model="base"):
    return parse_arguments(f"--model_name_or_path {model} --train_mixture t.yaml --output_dir out {flags}".split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nodes 2", "nodes is for a plan: add --plan"),
        ("--plan_device h100-80gb", "plan_device is for a plan"),
        ("--plan --plan_device h100", "'h100' is not known; did you mean h100"),
        ("--plan --plan_device abacus", "'abacus' is not known; there are b200-180gb"),
        ("--plan --gpus 0", "gpus must be at least 1, got 0"),
        ("--plan --mfu 40", "mfu must be above 0 and at most 1, got 40.0"),
    ],
)
def test_what_a_plan_does_not_take(flags, message):
    with pytest.raises(ValueError, match=message):
        plan_flags(flags)


RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


def families():
    yield from ((f"flamingo {decoder}", tiny_config(decoder)) for decoder in ("llama", "otter_mpt", "falcon", "opt"))
    config = tiny_config()
    config.vision_config = AutoConfig.for_model(**RESNET)
    yield "resnet", config
    yield "otterhd", tiny_model(tiny_processor()).config


@pytest.mark.parametrize(
    ("family", "config"), [*families()], ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize(
    "how",
    [
        "",
        "--lora True --lora_target_modules language:all-linear",
        "--load_in_4bit True --lora True --lora_target_modules language:all-linear",
        "--activation_checkpointing True",
    ],
)
def test_a_plan_for_another_machine(family, config, how):
    """Whatever device is here: a card that computes in bfloat16, and 128 of them."""
    parsed = plan_flags(f"--bf16 True --plan --plan_device H100-80gb --nodes 16 --gpus 8 --max_length 64 {how}")
    model = meta_model(parsed[0], config)
    plan = make_plan(model, *parsed, num_samples=10_000)
    assert (plan.world_size, plan.compute_dtype, plan.samples_per_step) == (128, "bfloat16", 1024)
    text = outlook(plan, model, *parsed)
    assert "989 TFLOP/s" in text and "128 of them" in text and "hours" in text
    assert text.count("  yes") == 5
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert {"none", "zero1", "zero2", "zero3", "fsdp"} <= set(rows)


def test_a_card_without_bfloat16_and_one_that_is_too_small(arguments):
    parsed = arguments("--plan --plan_device v100-16gb")
    parsed[2].bf16 = True
    with pytest.raises(ValueError, match="v100-16gb does not compute in bfloat16: set bf16 to false and fp16 to true"):
        plan_of(parsed)
    parsed = arguments("--plan --plan_device t4-16gb --fp16 True")
    plan = plan_of(parsed)
    plan.memory["activations"] = 15 * 2**30
    model = meta_model(parsed[0])
    assert "  no" in outlook(plan, model, *parsed)


def test_time_and_network_of_a_step(arguments):
    """By hand: 4 devices, all trained in float32."""
    parsed = arguments("--plan --plan_device a100-80gb --gpus 4 --mfu 0.5 --max_length 64")
    model = meta_model(parsed[0])
    plan = plan_of(parsed)
    weights, trained = (3 / 4 * 4 * model.num_parameters(only_trainable=only) for only in (False, True))
    sent = {name: network_bytes(model, parsed[0], parsed[2], 4, name) for name in SHARDINGS}
    once, every_pass = 2 * trained, 2 * weights + trained
    assert sent == {"none": once, "zero1": once, "zero2": once, "zero3": every_pass, "fsdp": every_pass}
    samples = plan.samples_per_step
    work = plan.flops.count(64 * samples, 64 * samples, 28 * 28 * samples, samples, 64**2 * samples)
    assert step_seconds(plan, model, *parsed[1:]) == pytest.approx(work / (4 * 312e12 * 0.5))


@pytest.mark.slow
def test_network_is_what_is_handed_to_the_collectives(tmp_path):
    """DDP's and FSDP2's own calls, counted in a process group of 4 that exists in name only."""
    script = Path(__file__).with_name("count_collectives.py")
    output = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=600)
    counted = json.loads(output.stdout.splitlines()[-1])
    # buckets and shards are padded
    assert counted["measured"]["none"] == pytest.approx(counted["planned"]["none"], rel=0.02)
    assert counted["measured"]["fsdp"] == pytest.approx(counted["planned"]["fsdp"], rel=0.1)


@pytest.mark.parametrize("flag", ["dry_run", "plan"])
def test_dry_run_loads_no_weights_and_leaves_nothing(ragged, caplog, monkeypatch, flag):
    monkeypatch.setattr("otter_hf.training.run._load_model", lambda *args: pytest.fail("weights were loaded"))
    flags = f"--model_name_or_path {ragged / 'base'} --train_mixture {ragged / 'data.yaml'} --use_cpu True"
    with caplog.at_level(logging.INFO, logger="otter_hf.training.run"):
        main([*flags.split(), "--output_dir", str(ragged / "out"), f"--{flag}", "--per_device_train_batch_size", "5"])
    assert "15 steps of 5 samples, at most 10,240 tokens" in caplog.text
    assert "attention: vision sdpa, language varlen_sdpa" in caplog.text
    assert "Liger kernels: no; torch.compile: no" in caplog.text
    assert not (ragged / "out").exists()


def test_steps_are_those_of_the_trainer(fit, caplog):
    with caplog.at_level(logging.INFO, logger="otter_hf.training.run"):
        out = fit(per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1.5)
    steps = json.loads((out / "trainer_state.json").read_text())["global_step"]
    assert f"{steps} steps of 10 samples" in caplog.text


def test_attention_for_packed_rows(arguments, model, monkeypatch):
    def chosen(flags, half=False):
        parsed = arguments(flags)
        parsed[2].bf16 = half
        return choose_attention(model.config, *parsed)

    assert chosen("") == {"": "varlen_sdpa", "text_config": "varlen_sdpa"}  # and a vision tower as it is
    assert chosen("--packing False") is None
    assert chosen("--attn_implementation eager") == "eager"
    assert chosen("--torch_compile True") is None
    monkeypatch.setattr(
        "otter_hf.training.kernels.best_varlen_attention",
        lambda config, device, dtype: "flash_attention_3" if dtype == torch.bfloat16 else "varlen_sdpa",
    )
    assert set(chosen("", half=True).values()) == {"flash_attention_3"}
    assert set(chosen("").values()) == {"varlen_sdpa"}
    lora = "--dtype bfloat16 --lora True --lora_target_modules q_proj"
    assert set(chosen(lora).values()) == {"flash_attention_3"}
    # without autocast PEFT has in float32 what is not in 4 bits
    assert set(chosen(f"{lora} --load_in_4bit True").values()) == {"varlen_sdpa"}
    for flags in (f"{lora} --load_in_4bit True", "--dtype float32"):
        for name in ("flash_attention_2", "text_config=kernels-community/flash-attn3"):
            with pytest.raises(ValueError, match="flash.* computes in 16 bits, but this training would in float32"):
                chosen(f"{flags} --attn_implementation {name}")
            assert chosen(f"{flags} --attn_implementation {name}", half=True)
    parsed = arguments("")
    assert set(choose_attention(OtterHDConfig(), *parsed).values()) == {"varlen_sdpa"}
    parsed[2].bf16 = True
    assert set(choose_attention(OtterHDConfig(), *parsed).values()) == {"flash_attention_3"}


def test_liger_replaces_the_decoder_before_it_is_made(model, monkeypatch):
    calls = []

    class Package:
        @staticmethod
        def _apply_liger_kernel(model_type, **options):
            calls.append((model_type, options))

    with pytest.raises(ValueError, match="use_liger_kernel needs liger-kernel"):
        use_liger_kernels(model.config)
    monkeypatch.setattr("otter_hf.training.kernels.is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match="use_liger_kernel needs a CUDA device"):
        use_liger_kernels(model.config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.transformers", Package)
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", Package)
    use_liger_kernels(model.config, {"rope": False})
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert calls == [("llama", {"rope": False, **losses})]


@pytest.mark.parametrize("adapters", [False, True])
def test_operations_are_counted_where_flash_attention_is_chosen(model, adapters):
    """Shapes are on no device, and transformers' flash attention asks which of them computes in 16 bits."""

    def make(attention):
        with torch.device("meta"):
            shapes = type(model)(copy.deepcopy(model.config))
            shapes.config._attn_implementation = attention
            return (
                get_peft_model(shapes, LoraConfig(target_modules=["q_proj"], modules_to_save=["perceiver"]))
                if adapters
                else shapes
            )

    flash = {"": "flash_attention_2", "text_config": "flash_attention_2"}
    shapes = make(flash)
    assert count_training_flops(shapes) == count_training_flops(make("eager"))
    used = {module.config._attn_implementation for module in shapes.modules() if isinstance(module, CrossAttention)}
    assert used == {"flash_attention_2"} and shapes.config._attn_implementation == "flash_attention_2"
