"""Checkpoints: killed at any moment, stopped on request, without frozen weights."""

import errno
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from filelock import FileLock
from training_files import PROGRAM, command, environment, losses, torchrun, weights, write_training_files
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from otter_hf.training import checkpoints, load_trainable
from otter_hf.training.arguments import parse_arguments
from otter_hf.training.checkpoints import STOPPED_EXIT_CODE, CheckpointTrainer, find_checkpoint
from otter_hf.training.run import run as main
from otter_hf.training.run import train
from otter_hf.training.run_record import RunRecord


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "freeze": ["vision"]}


def train_until_killed(arguments, cache, module, function, call):
    """Trains, and is killed by the `call`-th call of a function."""
    datasets.config.HF_DATASETS_CACHE = cache
    module = importlib.import_module(module)
    original, calls = getattr(module, function), []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, function, die)
    main(arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("files"), text_only=7)


@pytest.fixture(autouse=True)
def cache(files, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")


@pytest.fixture(scope="module")
def unbroken(files):
    """Output folder of a training that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", files / "cache")
        main(command(files, "unbroken", **SAVING))
    return files / "unbroken"


def assert_same_training(folder, unbroken):
    assert losses(folder) == losses(unbroken)
    expected = weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())


def test_a_checkpoint_is_complete(unbroken):
    for step in (2, 4, 6):
        folder = unbroken / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        AutoProcessor.from_pretrained(folder)
        assert AutoModelForImageTextToText.from_pretrained(folder).num_parameters()
    assert not (unbroken / "_unfinished").exists()


@pytest.mark.parametrize(
    ("module", "function", "call", "left"),
    [
        # in the second checkpoint: its weights are written, the optimizer is not
        ("torch", "save", 6, 2),
        # in the third step
        pytest.param("otter_hf.models.lm_loss", "scale_logits", 3, 2, marks=pytest.mark.slow),
        # the first checkpoint is written but has no name yet (three files have), and the last one is not whole
        pytest.param("os", "replace", 4, None, marks=pytest.mark.slow),
        pytest.param("safetensors.torch", "save_file", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_killed(files, unbroken, module, function, call, left):
    """kill -9, also in the middle of a checkpoint: `auto` goes on from the last whole one, to the same bits."""
    arguments = command(files, "killed", resume_from_checkpoint="auto", **SAVING)
    shutil.rmtree(files / "killed", ignore_errors=True)
    process = multiprocessing.get_context("forkserver").Process(
        target=train_until_killed, args=(arguments, files / "cache", module, function, call)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = find_checkpoint("auto", files / "killed")
    if left is not None:
        assert found == str(files / "killed" / f"checkpoint-{left}")
    main(arguments)
    assert_same_training(files / "killed", unbroken)
    assert not (files / "killed" / "_unfinished").exists()


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_checkpoint_is_passed_over(unbroken, tmp_path, caplog, has_manifest):
    """Whatever file of it is empty, missing or, by its checksum, another: the checkpoint before is taken, and told."""
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}").symlink_to(unbroken / f"checkpoint-{step}")
    (tmp_path / "run.json").write_bytes((unbroken / "run.json").read_bytes())
    checkpoint, whole = tmp_path / "checkpoint-6", unbroken / "checkpoint-6"
    ways = {"is missing|has no": type(whole).unlink, "has 0 of|is empty": empty}
    if has_manifest:
        ways["has other content"] = flip
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for name in [*names, "trainer_state.json", "config.json", "run.json"] if has_manifest else names:
        for told, damage in ways.items():
            if not has_manifest and name == "optimizer.pt" and damage is not empty:
                continue  # as with save_only_model
            checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)
            checkpoint.mkdir()
            for path in whole.iterdir():
                if path.name == name:
                    shutil.copy(path, checkpoint)
                elif has_manifest or path.name != "files.json":
                    (checkpoint / path.name).symlink_to(path)
            damage(checkpoint / name)
            caplog.clear()
            caplog.set_level("INFO", "otter_hf")
            assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-4")
            assert re.search(f"checkpoint-6 is damaged, .*({told}).*: it is passed over", caplog.text), name
            with pytest.raises(ValueError, match="checkpoint-6 is damaged, .*: name another one, or auto"):
                find_checkpoint(str(checkpoint), tmp_path)
    (tmp_path / "checkpoint-4").unlink()
    with pytest.raises(ValueError, match="Every checkpoint in .* is damaged, .*restore one, or remove them"):
        find_checkpoint("auto", tmp_path)


def test_a_folder_has_one_run_at_a_time(files, unbroken):
    """The second run is refused before it loads anything, and the first one's files stay as they are."""
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    held = FileLock(unbroken / ".lock")
    with held:
        (unbroken / ".lock").write_text(json.dumps({"process": 1, "host": "elsewhere", "since": "yesterday"}))
        with pytest.raises(OSError, match="unbroken is in use by process 1 on elsewhere since yesterday: wait until"):
            main(command(files, "unbroken", **SAVING))
    (unbroken / ".lock").unlink()
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_a_full_disk(files, monkeypatch):
    """One sentence; the checkpoint before is whole, and training goes on from it."""
    arguments = command(files, "filled", resume_from_checkpoint="auto", **SAVING)
    save, calls = torch.save, []

    def fill(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # the optimizer of the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OSError, match="No space left on device .*filled") as error:
        main(arguments)
    assert error.value.errno == errno.ENOSPC
    assert find_checkpoint("auto", files / "filled") == str(files / "filled" / "checkpoint-2")
    assert not (files / "filled" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.15, 0.4])
def test_killed_from_outside(files, unbroken, wait):
    arguments = command(files, "shot", resume_from_checkpoint="auto", **SAVING)
    shutil.rmtree(files / "shot", ignore_errors=True)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment(files))
    while not (files / "shot").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    process.wait()
    main(arguments)
    assert_same_training(files / "shot", unbroken)


def test_sigterm(files, unbroken):
    """The step is finished, a checkpoint written, and the exit code tells that training is not over."""
    evaluating = {"eval_mixture": str(files / "eval.yaml"), "eval_strategy": "epoch", "report_samples": 0}
    arguments = command(
        files, "stopped", **SAVING | evaluating | {"save_strategy": "epoch", "resume_from_checkpoint": "auto"}
    )
    # the signal comes in the middle of the third step
    with pytest.MonkeyPatch.context() as patch:
        from otter_hf.training.trainer import OtterTrainer

        original, calls = OtterTrainer.training_step, []

        def signalled(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *args, **kwargs)

        patch.setattr(OtterTrainer, "training_step", signalled)
        with pytest.raises(SystemExit) as stop:
            main(arguments)
    assert stop.value.code == STOPPED_EXIT_CODE == 143
    assert [path.name for path in (files / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    # the epoch is not over, so that it is not evaluated either
    assert "eval_loss" not in (files / "stopped" / "checkpoint-3" / "trainer_state.json").read_text()
    assert not (files / "stopped" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main(arguments)
    assert_same_training(files / "stopped", unbroken)
    history = json.loads((files / "stopped" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [5, 6]


def test_sigterm_to_data_workers(files):
    """It often goes to all processes of a job; workers that it ended would take the training with them."""
    trainer_process = os.getpid()

    def shoot(sample, generator):
        if os.getpid() != trainer_process:
            signal.raise_signal(signal.SIGTERM)
        return sample

    settings = {"dataloader_num_workers": 2, "eval_mixture": str(files / "eval.yaml"), "eval_strategy": "epoch"}
    main(command(files, "with_workers", **settings), transform=shoot)
    assert len(losses(files / "with_workers")) == 4
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "pretrain", "torchrun", "torchrun-pretrain", "accelerate"])
def test_sigterm_to_the_process_group(tmp_path, monkeypatch, kind):
    """A few of what `tests/drills/sigterm.py` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "drills"))
    import sigterm

    sigterm.prepare(tmp_path)
    results = sigterm.run(tmp_path, kind, 2)
    assert not [result for result in results if result["faults"]], results


def test_a_training_that_fails_gives_sigterm_back(files):
    with pytest.MonkeyPatch.context() as patch:
        from otter_hf.training.trainer import OtterTrainer

        def fail(*args, **kwargs):
            raise RuntimeError("broken")

        patch.setattr(OtterTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="broken"):
            main(command(files, "failed"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_processes_that_would_each_train_alone(tmp_path, monkeypatch):
    """Also with the arguments of transformers, which take a CPU without `use_cpu` for one process."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each would train by itself"):
        CheckpointTrainer(torch.nn.Linear(1, 1), arguments)


def test_one_process_uses_one_gpu(tmp_path, caplog):
    """transformers' Trainer would wrap the model in `torch.nn.DataParallel`."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=3)
    arguments._n_gpu = 2  # as where a process without a launcher sees two
    model = torch.nn.Linear(1, 1)
    with caplog.at_level("WARNING", "otter_hf"):
        trainer = CheckpointTrainer(model, arguments)
    assert "2 GPUs are there, and one of them is used: start a process for each with torchrun" in caplog.text
    assert arguments.train_batch_size == trainer._train_batch_size == 3
    assert trainer._wrap_model(model) is model


def test_the_token_stays_out_of_what_is_saved(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", hub_token="hf_secret")
    trainer = CheckpointTrainer(torch.nn.Linear(1, 1), arguments)
    trainer.save_model()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).output_dir == str(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert trainer.args.hub_token == "hf_secret"


def test_all_processes_go_on_from_what_the_first_one_found(tmp_path, monkeypatch):
    """Also where the disk of a node does not have it."""
    monkeypatch.setattr(checkpoints, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    run, found = RunRecord({}, 3), (RunRecord({}, 3, "first"), "elsewhere/checkpoint-2", False)
    arguments = SimpleNamespace(resume_from_checkpoint="auto", output_dir=str(tmp_path), ignore_data_skip=False)
    for told in (found, ValueError("It is damaged.")):
        outcome = [None, told] if isinstance(told, Exception) else [told, None]
        monkeypatch.setattr(
            checkpoints, "broadcast_object_list", lambda given, of=outcome: given.__setitem__(slice(2), of)
        )
        if isinstance(told, Exception):
            with pytest.raises(ValueError, match="It is damaged"):
                checkpoints.resume(run, arguments)
        else:
            assert checkpoints.resume(run, arguments) == found


def test_auto_starts_from_the_beginning_without_a_checkpoint(tmp_path):
    assert find_checkpoint("auto", tmp_path / "nowhere") is None
    assert find_checkpoint("true", tmp_path) is None
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("false", tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "_unfinished/checkpoint-11"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("trainer_state.json", "model.safetensors"):
            (tmp_path / name / file).write_text("{}")
    (tmp_path / "checkpoint-12").mkdir()  # by a program that does not write complete ones
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="is no checkpoint folder .* name a checkpoint-N folder, or set it to auto"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_going_on_compares(files, unbroken, caplog):
    """What differs is named before any weight is loaded; a finished run is left alone; no other run's checkpoint."""
    shutil.copytree(unbroken, files / "compared", ignore=shutil.ignore_patterns("checkpoint-[24]"))

    def go_on(output="compared", **settings):
        main(command(files, output, **SAVING | {"resume_from_checkpoint": "auto"} | settings))

    before = (files / "compared" / "model.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO", "otter_hf")
    go_on()
    assert "The run of 6 steps in" in caplog.text and "is complete: nothing is left to do" in caplog.text
    assert (files / "compared" / "model.safetensors").stat().st_mtime_ns == before
    # the disk was full, or a kill came, between the last checkpoint and the model
    for name in ("model.safetensors", "trainer_state.json"):
        (files / "compared" / name).unlink()
    go_on()
    assert_same_training(files / "compared", unbroken)
    for name, value in {
        "learning_rate": 0.02,
        "freeze": ["vision", "perceiver"],
        "per_device_train_batch_size": 2,
        "train_mixture": str(files / "eval.yaml"),
        "max_length": 99,
    }.items():
        shown = {"per_device_train_batch_size": "samples_per_step", "train_mixture": "data"}.get(name, name)
        with pytest.raises(ValueError, match=f"checkpoint-6 is of a run with other settings: .*{shown} was .* and is"):
            go_on(**{name: value})
    # as save_only_model leaves it
    for name in ("optimizer.pt", "files.json"):
        (files / "compared" / "checkpoint-6" / name).unlink()
    with pytest.raises(ValueError, match="has no optimizer, as with save_only_model"):
        go_on()

    # a run that was started anew there has made no checkpoint yet
    record = json.loads((files / "compared" / "run.json").read_text())
    (files / "compared" / "run.json").write_text(json.dumps(record | {"id": "another"}))
    assert find_checkpoint("auto", files / "compared") is None
    assert "Of another run, and left alone: checkpoint-6" in caplog.text


def test_the_last_and_the_best_are_kept(files):
    settings = {"eval_mixture": str(files / "eval.yaml"), "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 0.3}
    main(command(files, "limited", save_total_limit=1, **SAVING | settings))
    state = json.loads((files / "limited" / "trainer_state.json").read_text())
    by_step = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(by_step, key=by_step.get)
    assert state["best_model_checkpoint"] == str(files / "limited" / f"checkpoint-{best}")
    kept = {path.name for path in (files / "limited").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-6"}
    best_weights = weights(files / "limited" / f"checkpoint-{best}")
    assert all(torch.equal(tensor, best_weights[name]) for name, tensor in weights(files / "limited").items())


def test_trainable_only(files, unbroken):
    """Frozen weights are not written; base and checkpoint together are the trained model, also to go on with."""
    settings = SAVING | {"trainable_only": True, "freeze": ["vision", "language"]}
    whole = command(files, "whole", **settings | {"trainable_only": False})
    main(whole)
    card = train(*parse_arguments(command(files, "small", **settings))).make_card()
    assert 'load_trainable(folder, base="base"' in card and "from_pretrained" not in card
    out = files / "small"
    assert not list(out.rglob("model.safetensors"))
    sizes = [path.stat().st_size for path in (out / "trainable.safetensors", files / "whole" / "model.safetensors")]
    assert sizes[0] < 0.6 * sizes[1]
    assert json.loads((out / "trainable.json").read_text())["base_model_name_or_path"] == "../base"
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForImageTextToText.from_pretrained(out)

    expected = weights(files / "whole")
    # wherever both are moved to, also of a checkpoint
    shutil.copytree(files / "base", files / "moved" / "base")
    shutil.copytree(out, files / "moved" / "small")
    load_trainable(files / "moved" / "small" / "checkpoint-4")
    shutil.rmtree(files / "moved" / "base")
    with pytest.raises(ValueError, match="was trained on ../base, which is gone"):
        load_trainable(files / "moved" / "small")
    loaded = load_trainable(out)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    processor = AutoProcessor.from_pretrained(out / "checkpoint-4")
    assert processor.end_of_chunk_token_id in loaded.generation_config.eos_token_id

    shutil.rmtree(out / "checkpoint-6")
    main(command(files, "small", resume_from_checkpoint="auto", **settings))
    again = load_trainable(out, base=files / "base")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="it is a whole model"):
        load_trainable(files / "whole")


@pytest.mark.slow
def test_elastic_restart(files, unbroken):
    """`torchrun --max-restarts`: a process that dies once costs the steps since the last checkpoint."""
    two = {"per_device_train_batch_size": 2, "resume_from_checkpoint": "auto"}
    die_once = f"""
import os, pathlib, signal
from otter_hf.training.trainer import OtterTrainer

original, flag = OtterTrainer.training_step, pathlib.Path({str(files / "died")!r})

def step(self, *args, **kwargs):
    if self.state.global_step == 3 and self.args.process_index == 1 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

OtterTrainer.training_step = step
"""
    # the last batch of an epoch is not full, and two processes would fill it up
    arguments = command(files, "elastic", **SAVING | two | {"max_steps": 4})
    result = torchrun(
        files,
        arguments,
        *("--max-restarts", "1"),
        program=die_once + PROGRAM,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (files / "died").exists()
    assert "checkpoint-2" in result.stderr
    torch.testing.assert_close(losses(files / "elastic"), losses(unbroken)[:4], rtol=1e-4, atol=1e-5)


def test_a_token_without_embedding(files):
    """The device-side assert of 2023, said beforehand."""
    processor = AutoProcessor.from_pretrained(files / "base")
    rows = AutoModelForImageTextToText.from_pretrained(files / "base").config.text_config.vocab_size
    processor.tokenizer.add_tokens(["<new>"])
    shutil.copytree(files / "base", files / "larger")
    processor.save_pretrained(files / "larger")
    message = f"'<new>' has id {rows}, but the model has embeddings of {rows} tokens only"
    with pytest.raises(ValueError, match=message):
        main(command(files, "nothing", model_name_or_path=str(files / "larger")))
    assert not (files / "nothing").exists()
