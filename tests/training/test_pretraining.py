"""Pretraining from shards to a saved model, on a tiny random Otter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pretraining_shards import write_documents, write_pairs
from transformers import AutoModelForImageTextToText

from otter_hf.data.pretraining import PretrainingSet, PretrainingStream
from otter_hf.training.arguments import TrainingArguments
from otter_hf.training.manifest import write_manifest
from otter_hf.training.pretraining import PretrainingTrainer
from otter_hf.training.pretraining import run as main


@pytest.fixture
def files(model, processor, tmp_path):
    """A model folder `base`, shards, and `sets.yaml` with both kinds."""
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "docs")
    write_pairs(tmp_path / "pairs", shards=2, per_shard=6, bad=(4,))
    sets = {
        "mmc4": {"kind": "interleaved", "shards": "docs", "batch_size": 2, "num_samples": 8},
        "laion": {"kind": "pairs", "shards": "pairs", "batch_size": 3, "loss_weight": 0.2},
    }
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(sets, sort_keys=False))
    return tmp_path


def command(files, *flags, sets="sets.yaml", out="out", workers=0):
    paths = {"model_name_or_path": "base", "train_sets": sets, "output_dir": out}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(files / path))]
    fixed = "--use_cpu True --learning_rate 1e-2 --disable_tqdm True --logging_steps 1 --lr_scheduler_type constant"
    return [*arguments, *fixed.split(), "--dataloader_num_workers", str(workers), *flags]


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def history(folder, key="loss"):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


def test_joint_pretraining(files, model, processor):
    flags = [
        "--max_steps",
        "3",
        "--freeze",
        "vision",
        "language",
        "--train_embedding_rows",
        "<image>",
        "<|endofchunk|>",
    ]
    main(command(files, *flags))
    out = files / "out"
    assert len(history(out)) == len(history(out, "loss/mmc4")) == len(history(out, "loss/laion")) == 3
    for total, mmc4, laion in zip(history(out), history(out, "loss/mmc4"), history(out, "loss/laion"), strict=True):
        assert total == pytest.approx(mmc4 + 0.2 * laion, rel=1e-4)
    trained, before = load(out), dict(model.named_parameters())
    rows = [processor.image_token_id, processor.end_of_chunk_token_id]
    for name, parameter in trained.named_parameters():
        if ".vision_tower." in name or ".decoder_layer." in name:
            assert torch.equal(parameter, before[name]), name
    changed = (trained.get_input_embeddings().weight != model.get_input_embeddings().weight).any(dim=1)
    assert set(changed.nonzero().flatten().tolist()) <= set(rows)
    assert not torch.equal(trained.model.perceiver.latents, model.model.perceiver.latents)
    assert processor.end_of_chunk_token_id in trained.generation_config.eos_token_id


def test_single_set_of_twelve_pairs(files):
    """The CC3M and CC12M script of 2023."""
    (files / "cc3m.yaml").write_text("cc3m: {kind: pairs, shards: pairs, batch_size: 4}")
    main(command(files, "--max_steps", "3", sets="cc3m.yaml"))
    assert len(history(files / "out", "loss/cc3m")) == 3
    assert history(files / "out") == pytest.approx(history(files / "out", "loss/cc3m"))
    assert (files / "out" / "model.safetensors").exists()


def make_trainer(files, model, processor, **arguments):
    sets = [
        PretrainingSet("mmc4", "interleaved", files / "docs", batch_size=2, num_samples=8),
        PretrainingSet("laion", "pairs", files / "pairs", batch_size=3, loss_weight=0.2),
    ]
    args = TrainingArguments(str(files / "out"), use_cpu=True, disable_tqdm=True, report_to=[], **arguments)
    return PretrainingTrainer(
        model=model, args=args, train_dataset=PretrainingStream(sets, processor), processing_class=processor
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_is_the_weighted_sum_over_all_accumulated_labels(files, model, processor, accumulation):
    trainer = make_trainer(files, model, processor, gradient_accumulation_steps=accumulation)
    stream = PretrainingStream(trainer.train_dataset.sets, processor)
    steps = [batches for batches, _ in zip(stream.track(stream.dataloader()), range(accumulation), strict=False)]

    iterator = iter(trainer.get_train_dataloader())
    samples, items = trainer.get_batch_samples(iterator, accumulation, torch.device("cpu"))
    losses = [trainer.training_step(model, batches, items) for batches in samples]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    total = 0
    for name, weight in (("mmc4", 1.0), ("laion", 0.2)):
        summed = labels = 0
        for batches in steps:
            batch = {key: value for key, value in batches[name].items() if torch.is_tensor(value)}
            targets = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            summed += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            labels += (targets != -100).sum()
        total += weight * summed / labels
    total.backward()
    assert sum(losses).item() == pytest.approx(total.item(), rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_is_bit_equal(files, workers):
    """In the middle of an epoch of 4 batches, and in its second half after one at its end."""
    flags = ["--max_steps", "7", "--save_steps", "2"]
    main(command(files, *flags, workers=workers))
    out = files / "out"
    state = json.loads((out / "checkpoint-6" / "pretraining_stream_0.json").read_text())
    assert (state["epoch"], state["taken"]) == (1, 2)
    for step in (2, 4) if workers == 0 else (6,):
        again = files / f"from{step}"
        checkpoint = str(out / f"checkpoint-{step}")
        main(command(files, *flags, "--resume_from_checkpoint", checkpoint, out=again.name, workers=workers))
        assert history(again) == history(out)
        for (name, expected), parameter in zip(load(out).named_parameters(), load(again).parameters(), strict=True):
            assert torch.equal(parameter, expected), name


def test_going_on_from_nothing_is_refused(files, model, processor):
    trainer = make_trainer(files, model, processor)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoint_of_other_processes_is_refused(files):
    flags = ["--max_steps", "2", "--save_steps", "1"]
    main(command(files, *flags))
    checkpoint = files / "out" / "checkpoint-1"
    with pytest.raises(ValueError, match="saved with num_workers 0, now it is 1"):
        main(command(files, *flags, "--resume_from_checkpoint", str(checkpoint), workers=1))
    (checkpoint / "pretraining_stream_0.json").rename(checkpoint / "pretraining_stream_5.json")
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="written by another number of processes"):
        main(command(files, *flags, "--resume_from_checkpoint", str(checkpoint)))
    main(command(files, *flags, "--resume_from_checkpoint", str(checkpoint), "--ignore_data_skip", "True"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_sets", "gone.yaml"], "gone.yaml does not exist"),
        (["--lora", "True", "--lora_target_modules", "q_proj"], "lora is for fine-tuning"),
        (["--report_controls", "True"], "report_controls is for fine-tuning"),
        (["--train_mixture", "x.yaml"], "train_mixture"),
        (["--train_embedding_rows", "<imagee>"], "'<imagee>' is no token"),
        (["--plan", "--gpus", "2"], "gpus is for the plan of a fine-tuning"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(files, flags, message):
    with pytest.raises(ValueError, match=message):
        main(command(files, *flags))
    assert not (files / "out").exists()


def test_a_plan_trains_nothing(files, caplog):
    with caplog.at_level("INFO", "otter_hf"):
        main(command(files, "--plan", "--per_device_train_batch_size", "3"))
    assert "batches of each set in an epoch" in caplog.text
    assert "per_device_train_batch_size has no effect" in caplog.text
    assert not (files / "out").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_same_samples(files):
    """Two ranks with batches of one sample each against one with batches of two: the means are over all labels."""
    example = Path(__file__).resolve().parents[2] / "examples" / "pretrain_flamingo.py"
    sets = {"cc3m": {"kind": "pairs", "shards": "pairs", "batch_size": 1, "mirror": 0}}
    (files / "one.yaml").write_text(yaml.safe_dump(sets))
    sets["cc3m"]["batch_size"] = 2
    (files / "two.yaml").write_text(yaml.safe_dump(sets))
    # each rank takes a part of the round, and the single process both parts at once: no shuffling in either
    flags = ["--num_train_epochs", "1", "--ddp_backend", "gloo", "--block_size", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = command(files, *flags, sets="one.yaml")
    run = subprocess.run([*launcher, str(example), *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    losses = history(files / "out")
    states = [json.loads((files / "out" / f"checkpoint-6/pretraining_stream_{r}.json").read_text()) for r in range(2)]
    assert [state["shard"] for state in states] == [[0, 2], [1, 2]]

    streams = [
        PretrainingStream(
            [PretrainingSet("cc3m", "pairs", files / "pairs", batch_size=1, options={"mirror": 0.0})],
            load_processor(files),
            shard=(rank, 2),
            block_size=1,
        )
        for rank in range(2)
    ]
    model = load(files / "base").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step, pair in enumerate(zip(*(stream.track(stream.dataloader()) for stream in streams), strict=True)):
        summed = labels = 0
        for batches in pair:
            batch = {key: value for key, value in batches["cc3m"].items() if torch.is_tensor(value)}
            count = (batch["labels"][:, 1:] != -100).sum()
            summed, labels = summed + model(**batch).loss * count, labels + count
        loss = summed / labels
        assert losses[step] == pytest.approx(loss.item(), rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert step == 5


def load_processor(files):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(files / "base")
