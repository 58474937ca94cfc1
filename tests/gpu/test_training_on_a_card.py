"""
Training on a CUDA card: what a CPU cannot show. `python -m pytest -m gpu tests/gpu/test_training_on_a_card.py`.

The models are tiny, with heads of 64, which every build of flash attention takes. In the order of importance: the
losses of a run and what it saves, kernels of attention, updates in 4 bits, going on, evaluation, launchers.
"""

import contextlib
import gc
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

import yaml  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from card_models import write_base  # noqa: E402
from PIL import Image  # noqa: E402
from training_files import environment, losses  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)
from transformers.utils import is_flash_attn_2_available  # noqa: E402

from otter_hf.data import write_mimicit  # noqa: E402
from otter_hf.models.quantization import WHOLE_MODULES  # noqa: E402
from otter_hf.testing import write_tiny  # noqa: E402
from otter_hf.training.arguments import parse_arguments  # noqa: E402
from otter_hf.training.lora import add_lora  # noqa: E402
from otter_hf.training.run import train  # noqa: E402


pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "purple", "orange"]
FAMILIES = ["llama", "mpt", "otterhd"]
LINEAR = {
    "llama": ["q_proj", "v_proj"],
    "mpt": ["Wqkv", "out_proj"],
    "otterhd": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed"),
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Models by family; mixtures `pictures.yaml`, and `all.yaml` with texts, films and rows of several too."""
    folder = tmp_path_factory.mktemp("card")
    for family in FAMILIES:
        write_base(family, folder / family)
    images = {colour: Image.new("RGB", (40, 30), colour) for colour in COLOURS}
    asked, films, texts, shots = {}, {}, {}, {}
    for i, colour in enumerate(COLOURS):
        asked[f"p{i}"] = {"instruction": "what color?" * (1 + i % 3), "answer": colour, "image_ids": [colour]}
        frames = [COLOURS[(i + j) % 8] for j in range(1 + i % 4)]
        films[f"f{i}"] = {"instruction": "what comes first?", "answer": colour, "image_ids": frames}
        texts[f"t{i}"] = {"instruction": "say it " * (1 + i), "answer": "yes " * (1 + 5 * (i % 3)), "image_ids": []}
        shots[f"p{i}"] = [f"p{(i + j) % 8}" for j in (1, 2)]
    entries = {}
    for name, records, pictures in (("pictures", asked, images), ("films", films, images), ("texts", texts, {})):
        paths = write_mimicit(folder, name, records, pictures)
        entries[name] = {"mimicit_path": str(paths.instructions_path)}
        if pictures:
            entries[name]["images_path"] = str(paths.images_path)
    (folder / "shots_train.json").write_text(json.dumps(shots))
    in_context = entries["pictures"] | {"train_config_path": str(folder / "shots_train.json")}
    everything = {
        "IMAGE_TEXT": {"pictures": entries["pictures"]},
        "IMAGE_TEXT_IN_CONTEXT": {"shots": in_context},
        "VIDEO_TEXT": {"films": entries["films"]},
        "TEXT_ONLY": {"texts": entries["texts"]},
    }
    (folder / "pictures.yaml").write_text(yaml.safe_dump({"IMAGE_TEXT": everything["IMAGE_TEXT"]}))
    (folder / "all.yaml").write_text(yaml.safe_dump(everything))
    return folder


@pytest.fixture(autouse=True)
def alone(files, monkeypatch):
    """A data cache of the tests' own, and nothing of one run in the environment and state of the next."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.cuda.empty_cache()


def recipe(files: Path, family: str, output: str, **settings) -> list[str]:
    """Arguments of a run on the card, written down as a recipe."""
    fixed = {
        "model_name_or_path": str(files / family),
        "train_mixture": str(files / "pictures.yaml"),
        "output_dir": str(files / output),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "num_frames": 2,
        "peak_flops": 0,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path = files / f"{output}_{family}.yaml"
    path.write_text(yaml.safe_dump(fixed | settings))
    return [str(path)]


def fit(files: Path, family: str, output: str = "out", fresh: bool = True, **settings):
    """A run in this process, as `otter-hf train` makes it; the trainer of it, and its loss of each step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if fresh:
        shutil.rmtree(files / output, ignore_errors=True)
    trainer = train(*parse_arguments(recipe(files, family, output, **settings)))
    return trainer, losses(files / output)


def lora(family: str, **more) -> dict:
    settings = {"lora": True, "lora_r": 8, "lora_dropout": 0.0, "lora_target_modules": LINEAR[family]}
    return settings | ({} if family == "otterhd" else {"lora_train_groups": ["perceiver"]}) | more


def falls(values: list[float]) -> bool:
    return sum(values[-2:]) / 2 < 0.97 * values[0]


@torch.no_grad()
def logits(model, folder: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of a question about a picture, on the model's device; with autocast to `dtype`."""
    processor = AutoProcessor.from_pretrained(folder)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (40, 30), "red"), return_tensors="pt").to(model.device)
    context = contextlib.nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)
    with context:
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_losses_are_those_of_a_cpu(files, family, packing):
    """Float32 on both; then bfloat16, which rounds. Otters learn from all groups of samples."""
    mixture = str(files / ("pictures.yaml" if family == "otterhd" else "all.yaml"))
    settings = {"packing": packing, "train_mixture": mixture, "max_steps": 3, "learning_rate": 1e-3}
    _, expected = fit(files, family, use_cpu=True, **settings)
    trainer, got = fit(files, family, **settings)
    assert trainer.model.device.type == "cuda"
    assert got == pytest.approx(expected, rel=2e-3)
    assert fit(files, family, bf16=True, **settings)[1] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_learns_and_the_saved_model_has_its_logits(files, family):
    """The default attention and packing, workers and pinned memory as a user has them; then read again."""
    settings = {"dataloader_num_workers": 2, "peak_flops": None, "activation_checkpointing": True}
    trainer, curve = fit(files, family, bf16=True, max_steps=10, **settings)
    assert falls(curve), curve
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["peak_memory_gb"] < 20 and entry["tokens_per_second"] > 0 for entry in history)
    assert all(0 < entry["mfu"] < 1 for entry in history), history
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    again = AutoModelForImageTextToText.from_pretrained(files / "out").to("cuda")
    for (name, parameter), saved in zip(trainer.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, saved), name
    again.set_attn_implementation(trainer.model.config._attn_implementation)
    expected, got = (logits(model, files / "out", torch.bfloat16) for model in (trainer.model, again))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights, packing", [("float32", True), ("float32", False), ("bfloat16", True)])
def test_attention_kernels_give_the_same_losses(files, family, weights, packing):
    """Rotary embeddings and norms leave queries in float32 under autocast: each kernel has to take that."""
    mixture = str(files / ("pictures.yaml" if family == "otterhd" else "all.yaml"))
    settings = {"packing": packing, "train_mixture": mixture, "max_steps": 2, "learning_rate": 1e-4}
    curves = {}
    for kernel in ("eager", "varlen_sdpa" if packing else "sdpa", "flash_attention_2"):
        if kernel == "flash_attention_2" and not is_flash_attn_2_available():
            continue
        _, curves[kernel] = fit(files, family, bf16=True, dtype=weights, attn_implementation=kernel, **settings)
    for kernel, curve in curves.items():
        assert curve == pytest.approx(curves["eager"], rel=0.03), (kernel, curves)


def test_packed_rows_go_through_torchs_kernel(files, monkeypatch):
    """Not through a call per sample, which is right too, but slow."""
    from otter_hf.models import varlen_attention

    kernel, calls = varlen_attention.torch_varlen_kernel(), []
    monkeypatch.setattr(
        varlen_attention, "torch_varlen_kernel", lambda: lambda *a, **k: (calls.append(a[0].dtype), kernel(*a, **k))[1]
    )
    for family in FAMILIES:
        calls.clear()
        fit(files, family, bf16=True, max_steps=1, attn_implementation="text_config=varlen_sdpa")
        layers = 2 if family == "otterhd" else 4
        assert calls == [torch.bfloat16] * layers, family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [None, FLASH])
def test_lora_in_bfloat16(files, family, attention):
    """As the recipes have it: frozen weights in bfloat16, updates in float32; the adapters are read again."""
    settings = {"dtype": "bfloat16", "bf16": True, "activation_checkpointing": True, "max_steps": 10}
    trainer, curve = fit(files, family, attn_implementation=attention, **lora(family), **settings)
    assert falls(curve), curve
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    again = AutoModelForImageTextToText.from_pretrained(files / "out", dtype=torch.bfloat16).to("cuda")
    again.set_attn_implementation(trainer.model.get_base_model().config._attn_implementation)
    expected, got = (logits(model, files / "out", torch.bfloat16) for model in (trainer.model, again))
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [None, FLASH])
def test_four_bits(files, family, attention):
    """QLoRA as in the recipes; adapters are read again on the same 4 bits."""
    settings = {"load_in_4bit": True, "dtype": "bfloat16", "bf16": True, "activation_checkpointing": True}
    trainer, curve = fit(files, family, max_steps=10, attn_implementation=attention, **lora(family, **settings))
    assert falls(curve), curve
    stored = [module for module in trainer.model.modules() if type(module).__name__ == "Linear4bit"]
    assert stored and all(module.weight.dtype == torch.uint8 for module in stored)
    again = AutoModelForImageTextToText.from_pretrained(files / "out").to("cuda")
    assert torch.isfinite(logits(again, files / "out", torch.bfloat16)).all()


@needs_bitsandbytes
def test_four_bits_without_autocast(files):
    """`bf16` left out: what is between the layers is then float32, which flash attention does not take."""
    _, curve = fit(files, "llama", max_steps=10, **lora("llama", load_in_4bit=True, dtype="bfloat16"))
    assert falls(curve), curve


@pytest.mark.parametrize("name", ["otter_qlora", "otter_lora_24gb", "otterhd_qlora", "otterhd_lora", "otter_video"])
def test_recipes_as_they_are(files, name):
    """With a tiny model, tiny data and two steps in place of what they name."""
    if "qlora" in name:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    family = "otterhd" if "otterhd" in name else "llama" if "video" in name else "mpt"
    settings = yaml.safe_load((ROOT / "examples" / "recipes" / f"{name}.yaml").read_text())
    small = {"max_steps": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 2, "num_frames": 4}
    small |= {"dynamic_resolution": [40, 60]} if family == "otterhd" else {}
    paths = {"output_dir": str(files / "out"), "model_name_or_path": str(files / family)}
    paths["train_mixture"] = str(files / ("all.yaml" if "video" in name else "pictures.yaml"))
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "peak_flops": 0}
    _, curve = fit(files, family, **(settings | small | paths | quiet))
    assert len(curve) == 2 and (files / "out" / "checkpoint-2").is_dir()


@needs_bitsandbytes
def test_weights_in_eight_bits(files):
    """Read in 8 bits, low-rank updates on top: forward and backward pass in Python, as docs/training.md has it."""
    settings = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=[rf"(?:.*\.)?{name}" for name in WHOLE_MODULES]
    )
    for family in FAMILIES:
        model = AutoModelForImageTextToText.from_pretrained(
            files / family, quantization_config=settings, dtype=torch.bfloat16
        )
        assert any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
        whole = AutoModelForImageTextToText.from_pretrained(files / family, dtype=torch.bfloat16).to("cuda")
        expected, got = logits(whole, files / family), logits(model, files / family)
        assert (got - expected).norm() < 0.25 * expected.norm(), family
        arguments = recipe(files, family, "out", **lora(family, bf16=True))
        model_args, _, training_args = parse_arguments(arguments)
        adapted = add_lora(model, model_args, training_args).train()
        ids = torch.arange(4, 20, device="cuda")[None]
        with torch.autocast("cuda", torch.bfloat16):
            adapted(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
        assert gradients and all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="bfloat16"),
        pytest.param({"lora": True}, id="dropout"),
        pytest.param({"lora": True, "load_in_4bit": True, "optim": "paged_adamw_8bit"}, id="four-bits-paged"),
        pytest.param({"optim": "adamw_torch_fused", "dataloader_num_workers": 2}, id="fused-workers"),
    ],
)
def test_gone_on_with_as_if_never_stopped(files, settings):
    """Weights, moments, data and the card's random numbers (dropout of half) come back from a checkpoint."""
    if "load_in_4bit" in settings:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    if "lora" in settings:
        settings = lora("llama", dtype="bfloat16", **settings) | {"lora_dropout": 0.5}
    settings = {"bf16": True, "max_steps": 5, "save_strategy": "steps", "save_steps": 2, **settings}
    _, unbroken = fit(files, "llama", **settings)
    for step in (4, 5):
        shutil.rmtree(files / "out" / f"checkpoint-{step}", ignore_errors=True)
    _, resumed = fit(files, "llama", fresh=False, resume_from_checkpoint="auto", **settings)
    assert resumed[:2] == unbroken[:2]
    assert resumed[2:] == pytest.approx(unbroken[2:], rel=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", [None, FLASH])
def test_evaluation_during_training(files, family, attention):
    """Losses, answers to samples in the report, the best model at the end; generation in the precision of training."""
    more = {"eval_mixture": str(files / "pictures.yaml"), "eval_strategy": "steps", "eval_steps": 2}
    more |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "report_controls": True}
    trainer, _ = fit(files, family, bf16=True, max_steps=4, attn_implementation=attention, **more)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert all(0 <= entry["eval_answer_accuracy"] <= 1 for entry in evaluated)
    assert (files / "out" / "training_report.html").stat().st_size > 1000
    assert "sample_answers" in json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("frozen", [["vision", "language"], ["vision", "language", "perceiver"]])
def test_kept_features_and_text_states(files, frozen):
    """What frozen parts make, on disk and on the card: the losses are those without."""
    settings = {"freeze": [*frozen, "embeddings"], "bf16": True, "packing": False, "max_steps": 4}
    settings |= {"train_mixture": str(files / "all.yaml")}
    _, expected = fit(files, "llama", **settings)
    store = files / f"store{len(frozen)}"
    for _ in range(2):  # written, then read
        _, got = fit(files, "llama", media_store=str(store), cache_text_states=True, **settings)
        assert got == pytest.approx(expected, rel=0.02)
    assert list(store.rglob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_scales_its_gradients(files, family):
    # flash attention can be built without float16
    _, curve = fit(files, family, fp16=True, max_steps=12, attn_implementation="sdpa")
    assert falls(curve), curve


@needs_bitsandbytes
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_bnb_8bit"])
def test_optimizer_in_eight_bits(files, optim):
    _, curve = fit(files, "mpt", bf16=True, optim=optim, max_steps=10)
    assert falls(curve), curve


def test_the_memory_that_is_planned(files, caplog):
    """Of weights, gradients and optimizer the card holds what the plan says; activations are an estimate."""
    from otter_hf.loading import read_config
    from otter_hf.training.plan import make_plan, meta_model

    arguments = parse_arguments(recipe(files, "llama", "out", bf16=True))
    shapes = meta_model(arguments[0], read_config(str(files / "llama")), "sdpa", autocast=True)
    plan = make_plan(shapes, *arguments, num_samples=8)
    assert "bfloat16" in str(plan)
    gc.collect()
    before = torch.cuda.memory_allocated()
    trainer, _ = fit(files, "llama", bf16=True, attn_implementation="sdpa", max_steps=2)
    states = plan.memory["weights"] + plan.memory["optimizer"]
    held = torch.cuda.memory_allocated() - before
    assert 0.9 * states < held < 1.6 * states + 2**22, (held, plan.memory)
    assert trainer.state.log_history


def test_sigterm_ends_with_a_checkpoint(files):
    """In a process of its own, on the card."""
    program = (
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "from otter_hf.training import run\n"
        "class Stop(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 1:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "made = run.OtterTrainer.__init__\n"
        "def make(self, *args, **kwargs):\n"
        "    made(self, *args, **kwargs)\n"
        "    self.add_callback(Stop())\n"
        "run.OtterTrainer.__init__ = make\n"
        "run.main(sys.argv[1:])\n"
    )
    settings = {"bf16": True, "save_strategy": "steps", "save_steps": 100, "dataloader_num_workers": 2}
    stopped = subprocess.run(
        [sys.executable, "-c", program, *recipe(files, "llama", "stopped", **settings)],
        env=environment(files, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert stopped.returncode == 143, stopped.stderr[-3000:]
    assert (files / "stopped" / "checkpoint-2" / "optimizer.pt").is_file()


@pytest.fixture(scope="module")
def launched(files) -> dict[str, subprocess.CompletedProcess]:
    """One process under NCCL by each launcher, all at once: starting takes longer than training."""
    settings = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"eval_mixture": str(files / "pictures.yaml"), "eval_strategy": "steps", "eval_steps": 2}
    environ = environment(files, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    processes = {}
    for name in ("torchrun", "ddp", "fsdp2", "fsdp2_offload"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        if name == "torchrun":
            start = ["torch.distributed.run", "--nproc-per-node", "1", "--master-port", port]
        else:
            config = str(ROOT / "examples" / "accelerate_configs" / f"{name}.yaml")
            start = ["accelerate.commands.launch", "--config_file", config, "--num_processes", "1"]
            start += ["--main_process_port", port]
        command = [
            sys.executable,
            "-m",
            *start,
            "-m",
            "otter_hf.cli",
            "train",
            *recipe(files, "llama", name, **settings),
        ]
        output = open(files / f"{name}.log", "w")  # noqa: SIM115
        processes[name] = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
    codes = {}
    for name, process in processes.items():
        try:
            codes[name] = process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            codes[name] = "too long"
    return {name: (code, (files / f"{name}.log").read_text()[-3000:]) for name, code in codes.items()}


@pytest.mark.parametrize("launcher", ["fsdp2", "torchrun", "ddp", "fsdp2_offload"])
def test_launchers_with_one_process(files, launched, launcher):
    """NCCL, and FSDP2 as configured in examples/: the losses of a run without, and a model that loads."""
    code, log = launched[launcher]
    assert code == 0, log
    _, expected = fit(files, "llama", bf16=True, max_steps=4)
    assert losses(files / launcher) == pytest.approx(expected, rel=0.03)
    model = AutoModelForImageTextToText.from_pretrained(files / launcher).to("cuda")
    assert torch.isfinite(logits(model, files / launcher)).all()
    assert (files / launcher / "checkpoint-4").is_dir()


def test_idefics(files):
    write_tiny("idefics", files / "idefics")
    _, curve = fit(files, "idefics", bf16=True, max_steps=10, learning_rate=1e-2)
    assert falls(curve), curve


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(files, family):
    """Graphs without inductor's code, which takes minutes to make: that tracing goes through."""
    settings = {"bf16": True, "torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
    _, curve = fit(files, family, packing=False, **settings)
    torch._dynamo.reset()
    assert curve == pytest.approx(fit(files, family, bf16=True, packing=False, max_steps=3)[1], rel=0.05)
