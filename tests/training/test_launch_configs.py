"""The accelerate configurations in `examples/` are what their names say, and the SLURM script is a script."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from training_files import command, environment, losses, write_training_files


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))


def launch_environment(path: Path, monkeypatch) -> tuple[dict, object]:
    """What `accelerate launch --config_file path` tells its processes, and how the file was understood."""
    monkeypatch.setattr("accelerate.commands.launch.is_bf16_available", lambda *_: True, raising=False)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1], defaults
    return prepare_multi_gpu_env(arguments), defaults


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path, monkeypatch):
    settings, config = launch_environment(path, monkeypatch)
    assert config.num_processes == 2 and config.num_machines == 1
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")
    kind, offload = path.stem.removesuffix("_offload"), path.stem.endswith("_offload")
    assert (settings.get("ACCELERATE_USE_FSDP") == "true") == (kind == "fsdp2")
    assert (settings.get("ACCELERATE_USE_DEEPSPEED") == "true") == kind.startswith("zero")
    if kind == "fsdp2":
        assert config.distributed_type == DistributedType.FSDP
        assert settings["FSDP_VERSION"] == "2"
        assert settings["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert settings["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert settings["FSDP_OFFLOAD_PARAMS"].lower() == str(offload).lower()
    elif kind.startswith("zero"):
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert settings["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == kind[-1]
        for part in ("OPTIMIZER", "PARAM"):
            assert settings[f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"] == ("cpu" if offload else "none")
        if kind == "zero3":
            assert settings["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"].lower() == "true"
    else:
        assert config.distributed_type == DistributedType.MULTI_GPU


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_plugin_reads_the_zero_configs(stage, monkeypatch):
    """accelerate's own reading, without deepspeed itself."""
    from accelerate.utils import DeepSpeedPlugin

    settings, _ = launch_environment(EXAMPLES / "accelerate_configs" / f"zero{stage}.yaml", monkeypatch)
    for name, value in settings.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.utils.dataclasses.is_deepspeed_available", lambda: True, raising=False)
    try:
        plugin = DeepSpeedPlugin()
    except ImportError as error:
        pytest.skip(f"deepspeed is not installed: {error}")
    assert plugin.zero_stage == stage
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"


@pytest.mark.slow
def test_cpu_config_starts_two_processes(tmp_path):
    """`accelerate launch` with the CPU configuration: two processes, whose losses are those of one."""
    folder = write_training_files(tmp_path, text_only=7)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch += [str(EXAMPLES / "accelerate_configs" / "cpu.yaml"), "--main_process_port", port]
    recipe = command(folder, "out", per_device_train_batch_size=2)
    run = subprocess.run(
        [*launch, "-m", "otter_hf.cli", "train", *recipe, "--use_cpu", "True"],
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "2 device(s)" in run.stderr
    assert len(losses(folder / "out")) == 4


def test_slurm_script():
    script = EXAMPLES / "slurm_train.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    assert "--resume_from_checkpoint auto" in text and "pkill" not in text
    assert os.access(script, os.X_OK)
