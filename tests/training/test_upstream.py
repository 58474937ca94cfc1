"""The flags of the 2023 training script."""

import json
import os
import tarfile

import pytest

from otter_hf.data.pretraining import read_pretraining_sets
from otter_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainingDataArguments,
    TrainingArguments,
    parse_arguments,
)
from otter_hf.training.upstream import translate


BASE = ["--pretrained_model_name_or_path", "m", "--training_data_yaml", "t.yaml", "--use_cpu", "True"]


def parse(*flags, base=BASE):
    return parse_arguments([*base, "--external_save_dir", "runs", *flags])


def test_the_command_of_the_readme_of_2023(caplog, monkeypatch):
    monkeypatch.setattr("otter_hf.training.arguments.get_reporting_integration_callbacks", lambda names: [])
    monkeypatch.setenv("WANDB_PROJECT", "before")
    monkeypatch.setenv("WANDB_ENTITY", "before")
    caplog.set_level("INFO", "otter_hf")
    flags = """--model_name otter --instruction_format simple --batch_size 8 --num_epochs 3 --report_to_wandb
        --wandb_entity lab --external_save_dir out/ --run_name Otter-MPT7B --wandb_project OTTER --workers 1
        --lr_scheduler cosine --learning_rate 2e-5 --warmup_steps_ratio 0.01 --save_hf_model --max_seq_len 1024
        --patch-image-size 224 --mask_lm_head --delete_previous_checkpoint --save_ckpt_each_epoch --resample_frames 16
        --gradient_checkpointing --with_task_description --dist-url env:// --no-set-device-rank"""
    model_args, data_args, training_args = parse_arguments([*BASE, *flags.split()])
    assert (model_args.model_name_or_path, data_args.train_mixture) == ("m", "t.yaml")
    assert model_args.train_embedding_rows == ["<answer>"]
    assert (data_args.max_length, data_args.num_frames, data_args.use_task_description) == (1024, 16, True)
    assert (training_args.output_dir, training_args.run_name) == ("out/Otter-MPT7B", "Otter-MPT7B")
    assert (training_args.per_device_train_batch_size, training_args.num_train_epochs) == (8, 3)
    assert (training_args.lr_scheduler_type, training_args.warmup_steps) == ("cosine", 0.01)
    assert (training_args.dataloader_num_workers, training_args.learning_rate) == (1, 2e-5)
    assert (training_args.save_strategy, training_args.save_total_limit) == ("epoch", 1)
    assert training_args.report_to == ["wandb"]
    assert training_args.activation_checkpointing
    notes = [message.split(":")[0] for message in caplog.messages if "no effect" in message]
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_ENTITY"]) == ("OTTER", "lab")
    # what the code of 2023 did by itself, and the command says nothing of
    assert model_args.freeze == ["vision", "language"]
    assert (training_args.weight_decay, training_args.bf16) == (0.1, True)
    assert "freeze vision language, weight_decay 0.1, bf16 True" in caplog.text
    dead = "model_name save_hf_model patch-image-size dist-url no-set-device-rank"
    assert sorted(notes) == sorted(dead.split())


def test_arguments_of_transformers_before_version_5(caplog):
    flags = "--warmup_ratio 0.03 --evaluation_strategy no --overwrite_output_dir True --save_safetensors True"
    arguments = parse(*flags.split())[2]
    assert (arguments.warmup_steps, arguments.eval_strategy) == (0.03, "no")
    assert [message for message in caplog.messages if "no effect" in message] == [
        "overwrite_output_dir: resume_from_checkpoint says whether a run goes on; it has no effect.",
        "save_safetensors: weights are always safetensors; it has no effect.",
    ]


def test_an_argument_under_two_names_is_refused(tmp_path):
    """Within one place; a flag wins over the recipe, whatever each calls it."""
    both = "warmup_ratio is 0.03, and warmup_steps 100, which are the same argument: give one of them"
    with pytest.raises(ValueError, match=both):
        parse("--warmup_ratio", "0.03", "--warmup-steps", "100")
    (tmp_path / "recipe.yaml").write_text("warmup_ratio: 0.03\nwarmup_steps: 100\n")
    with pytest.raises(ValueError, match=both):
        parse(base=[str(tmp_path / "recipe.yaml"), *BASE])
    (tmp_path / "recipe.yaml").write_text("warmup_ratio: 0.03\n")
    flags = ("--warmup_steps", "100", "--warmup_steps_ratio", "100")
    assert parse(*flags, base=[str(tmp_path / "recipe.yaml"), *BASE])[2].warmup_steps == 100


def test_flags_in_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "pretrained_model_name_or_path: m\ntraining_data_yaml: t.yaml\nuse_cpu: true\nbatch_size: 3\n"
        "dynamic_resolution: true\nenable_lora: true\nexternal_save_dir: a\nsave_steps_interval: 7\n"
        "lr_scheduler: constant"
    )
    model_args, data_args, training_args = parse_arguments([str(tmp_path / "recipe.yaml"), "--batch_size", "4"])
    assert training_args.per_device_train_batch_size == 4
    assert (training_args.output_dir, training_args.save_steps) == ("a/otter-9b", 7)
    assert training_args.lr_scheduler_type == "constant_with_warmup"
    assert data_args.dynamic_resolution == [448, 512, 768]
    assert model_args.lora
    assert model_args.lora_target_modules[-1] == "lm_head"


@pytest.mark.parametrize(
    ("flags", "frozen", "decay", "bf16"),
    [
        ("--model_name flamingo", ["vision", "language"], 0.1, True),
        ("", ["vision", "language"], 0.1, True),  # otter was the default
        ("--model_name fuyu", [], 0.0, True),
        ("--model_name idefics --weight_decay 0.2", [], 0.2, True),
        ("--freeze perceiver --bf16 False --weight_decay 0", ["perceiver"], 0.0, False),
        ("--model_name otter --lora True --lora_target_modules Wqkv", [], 0.1, True),
    ],
)
def test_what_was_never_said_in_2023(flags, frozen, decay, bf16):
    model_args, _, training_args = parse(*flags.split())
    assert (model_args.freeze, training_args.weight_decay, training_args.bf16) == (frozen, decay, bf16)


@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        ({"model_type": "otter"}, ["vision", "language"]),
        ({"model_type": "otter", "train_lang_encoder": True}, ["vision"]),
        ({"model_type": "flamingo", "train_vision_encoder": True}, ["language"]),
        ({"model_type": "otter", "train_full_model": True}, []),
        ({"model_type": "fuyu"}, []),
    ],
)
def test_switches_in_a_configuration_of_2023(tmp_path, config, frozen):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert parse(base=["--pretrained_model_name_or_path", str(tmp_path), *BASE[2:]])[0].freeze == frozen


def test_todays_command_is_left_alone():
    base = ["--model_name_or_path", "m", "--train_mixture", "t.yaml", "--output_dir", "o", "--use_cpu", "True"]
    model_args, _, training_args = parse_arguments(base)
    assert (model_args.freeze, training_args.weight_decay, training_args.bf16) == ([], 0.0, False)


def test_the_pretraining_command_of_2023(tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        shard.addfile(tarfile.TarInfo("0.txt"))
    flags = f"""--pretrained_model_name_or_path m --run_name flamingo3B --external_save_dir runs --dataset_resampled
        --mmc4_shards {tmp_path}/0.tar --laion_shards {tmp_path}/0.tar --batch_size_mmc4 4 --batch_size_laion 8
        --train_num_samples_mmc4 64 --train_num_samples_laion 64 --loss_multiplier_laion 0.5 --workers 2
        --mmc4_textsim_threshold 0.3 --precision amp_bf16 --max-src-length 512 --mask_lm_head --use_cpu True"""
    kinds = (ModelArguments, PretrainingDataArguments, TrainingArguments)
    model_args, data_args, training_args = parse_arguments(flags.split(), kinds)
    assert training_args.output_dir == "runs/flamingo3B"
    assert model_args.freeze == ["vision", "language"]
    assert model_args.train_embedding_rows == ["<image>", "<|endofchunk|>"]
    mmc4, laion = read_pretraining_sets(data_args.train_sets)
    assert (mmc4.kind, mmc4.batch_size, mmc4.num_samples, mmc4.loss_weight) == ("interleaved", 4, 64, 1.0)
    assert (mmc4.options, mmc4.resampled) == ({"min_similarity": 0.3}, True)
    assert (laion.kind, laion.batch_size, laion.loss_weight, laion.resampled) == ("pairs", 8, 0.5, True)
    assert sorted(message.split(":")[0] for message in caplog.messages if "no effect" in message) == [
        "max-src-length",
        "precision",
    ]
    with pytest.raises(ValueError, match="batch_size_mmc4 must be a number, got 'many'"):
        parse_arguments(["--batch_size_mmc4", "many"], kinds)
    with pytest.raises(ValueError, match="mmc4_shards is of pretraining: `otter-hf pretrain` takes it"):
        parse("--mmc4_shards", "x")


def test_changed_meanings():
    assert parse("--dynamic_resolution")[1].dynamic_resolution == [448, 512, 768]
    assert parse("--dynamic_resolution", "224")[1].dynamic_resolution == [224]
    assert parse("--image_resolution", "336,336")[1].dynamic_resolution == [336]
    assert parse("--save_steps_interval", "-1")[2].save_strategy == "steps"
    assert parse("--resume_from_checkpoint")[2].resume_from_checkpoint == "True"
    assert parse("--remove_answer_token", "--remove_eos_token")[1].remove_answer_token
    assert parse("--remove_eos_token")[1].remove_end_of_turn_token
    assert parse("--batch_size=2")[2].per_device_train_batch_size == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--customized_config c.json", "customized_config is not supported: edit config.json"),
        ("--trained_ckpt w.pt", "trained_ckpt is not supported: .* `otter-hf convert trainer-pt`"),
        ("--resize_embedding", "resize_embedding is not supported: a converted model has a row"),
        ("--lr_scheduler polynomial", "lr_scheduler must be constant, linear or cosine, got 'polynomial'"),
        ("--image_resolution 448,336", "image_resolution must be a square such as 448,448, got 448,336"),
    ],
)
def test_what_cannot_be_had_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags.split())


def test_words_before_any_flag():
    with pytest.raises(ValueError, match="'-x' belongs to no flag"):
        parse_arguments(["-x"])


@pytest.mark.parametrize(
    "flag",
    """pretrained_model_name_or_path model_name instruction_format training_data_yaml customized_config trained_ckpt
    peft_model_name_or_path enable_lora resize_embedding external_save_dir run_name num_epochs batch_size
    gradient_accumulation_steps learning_rate lr_scheduler warmup_steps warmup_steps_ratio weight_decay seed workers
    gradient_checkpointing max_seq_len patch-image-size resample_frames image_resolution dynamic_resolution
    keep_symbols remove_answer_token remove_eos_token populate_rel_ins with_task_description mask_lm_head logging_steps
    report_to_wandb wandb_project wandb_entity offline save_hf_model save_ckpt_each_epoch save_steps_interval
    delete_previous_checkpoint resume_from_checkpoint save_checkpoints_to_wandb dist-url dist-backend
    no-set-device-rank""".split(),
)
def test_every_flag_is_known(flag):
    """Each is an argument, stands for one, has a note, or is refused with what to do."""
    values = {"lr_scheduler": "cosine", "image_resolution": "8,8", "save_steps_interval": "1"}
    notes = []
    try:
        options = translate([(flag, [values[flag]] if flag in values else ["1"])], notes.append)
    except ValueError as error:
        assert str(error).startswith(f"{flag} is not supported: ")
        return
    if not options:
        assert len(notes) == 1
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    assert all(any(name in kind.__dataclass_fields__ for kind in kinds) for name, _ in options)
