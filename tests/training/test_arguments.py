"""Arguments of fine-tuning from YAML and flags; mistakes end in one sentence."""

import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from otter_hf.training.arguments import DataArguments, TrainingArguments, parse_arguments
from otter_hf.training.limits import check_metrics, check_numbers
from otter_hf.training.run import _carry_frames, _check_frames, _check_sizes, _farewell, _tell


FLAGS = ["--model_name_or_path", "m", "--train_mixture", "t.yaml", "--output_dir", "out"]


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        required = ["model_name_or_path: m\n", "train_mixture: t.yaml\n", "output_dir: out\n"]
        path.write_text("".join(line for line in required if line.split(":")[0] not in text) + text)
        return str(path)

    return write


def test_flags():
    model_args, data_args, training_args = parse_arguments(
        [*FLAGS, *"--freeze vision language --max_length 64 --learning_rate 1e-3 --use_cpu True".split()]
    )
    assert model_args.freeze == ["vision", "language"]
    assert (data_args.max_length, data_args.eval_mixture, data_args.instruction_format) == (64, None, None)
    assert training_args.learning_rate == 1e-3
    assert training_args.remove_unused_columns is False


def test_yaml_and_flags_of_which_the_flag_wins(recipe):
    path = recipe("freeze: [vision]\nlearning_rate: 5e-4\nuse_cpu: true\nmax_length: 32\nmax_context:\n")
    model_args, data_args, training_args = parse_arguments([path, "--learning_rate", "0.25", "--freeze", "perceiver"])
    assert model_args.freeze == ["perceiver"]
    assert (data_args.max_length, data_args.max_context) == (32, None)
    assert (training_args.learning_rate, training_args.use_cpu) == (0.25, True)


def test_an_empty_list_is_said(recipe):
    """It undoes what a recipe says, and what the code of 2023 froze without being told."""
    assert parse_arguments([recipe("use_cpu: true\nfreeze: [vision]\n"), "--freeze"])[0].freeze == []
    of_2023 = recipe("pretrained_model_name_or_path: m\nuse_cpu: true\n")
    assert parse_arguments([of_2023])[0].freeze == ["vision", "language"]
    of_2023 = recipe("pretrained_model_name_or_path: m\nuse_cpu: true\nfreeze: []\ndynamic_resolution: []\n")
    model_args, data_args, _ = parse_arguments([of_2023])
    assert (model_args.freeze, data_args.dynamic_resolution) == ([], [])


def test_a_number_is_one_in_python_too():
    with pytest.raises(ValueError, match="max_length must be a number, got None; the default is 2048"):
        check_numbers(DataArguments(train_mixture="t.yaml", max_length=None))


def test_the_precision_of_the_launcher(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision`, or its configuration: what transformers' Trainer computes in."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    assert not TrainingArguments(**options).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingArguments(**options).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert TrainingArguments(**options, bf16=True).mixed_precision == "bf16"
    with pytest.raises(ValueError, match="fp16 is True, but on a CPU"):
        TrainingArguments(**options)


def test_dict_in_yaml(recipe):
    path = recipe("use_cpu: true\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 0.125}\n")
    assert parse_arguments([path])[2].lr_scheduler_kwargs == {"min_lr": 0.125}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"recipe.yaml: 'learning_rat' is no argument; did you mean 'learning_rate'\?"),
        ("model_name_or_path: no/such/folder", "'no/such/folder' is neither a folder here nor a Hub id"),
        ("freeze: [eyes]", "freeze: 'eyes' is no group, use some of vision, perceiver"),
        ("learning_rate: fast", "learning_rate.*: invalid float value: 'fast'"),
        ("on_overlong: [", "recipe.yaml cannot be parsed"),
        ("instruction_format: xml", "Unknown instruction format 'xml': use one of simple"),
        ("dtype: int3", "dtype must be auto, float32, .*, got 'int3'"),
        ("remove_unused_columns: true", "remove_unused_columns must stay False"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor is 0.1"),
        ("max_length: null", "max_length is null, and must be a number; leave the line out for 2048"),
        ("max_seq_len: null", "max_seq_len is null, and must be a number; leave the line out for 2048"),
        ("accelerator_config: {dispatch_batches: true}", "split_batches and dispatch_batches cut batches up by rows"),
        ("accelerator_config: {dispatched: true}", "hold what nothing takes: .*'dispatched'"),
        ("train_sampling_strategy: sequential", "train_sampling_strategy is 'sequential'"),
    ],
)
def test_mistakes_in_the_recipe(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([recipe("use_cpu: true\n" + text)])


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match="The recipe nowhere.yaml does not exist"):
        parse_arguments(["nowhere.yaml"])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="list.yaml must map argument names to values"):
        parse_arguments([str(tmp_path / "list.yaml")])
    with pytest.raises(ValueError, match="the following arguments are required: --model_name_or_path"):
        parse_arguments([])
    with pytest.raises(ValueError, match="--colour"):
        parse_arguments([*FLAGS, "--use_cpu", "True", "--colour", "red"])


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ("--report_to wandb", {}, "report_to: wandb cannot be used .*install it, or set report_to to none"),
        ("--report_to wanbd", {}, "report_to: wanbd cannot be used"),
        ("--report_to none", {"WORLD_SIZE": "2"}, "2 processes were started, .*set use_cpu to true"),
        (
            "--report_to none",
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "2 processes were started, but each would train by itself",
        ),
    ],
)
def test_what_would_fail_later_is_refused_at_once(flags, environment, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    with pytest.raises(ValueError, match=message):
        parse_arguments(f"--model_name_or_path base --train_mixture t.yaml --output_dir out {flags}".split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "eval_acuracy"}, "'eval_acuracy' is not measured; did you mean 'answer_accuracy'"),
        (
            {"metric_for_best_model": "answer_accuracy", "prediction_loss_only": True},
            "'answer_accuracy' is not measured",
        ),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must stay True"),
    ],
)
def test_what_no_evaluation_measures(settings, message, tmp_path):
    """In Python a trainer may have metrics of its own."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    with pytest.raises(ValueError, match=message):
        check_metrics(arguments)


@pytest.mark.parametrize("shared", ["True", "False"])
def test_restarts_need_a_store_of_their_own(shared, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun" in caplog.text) == (shared == "True")


def test_too_few_samples_for_one_batch():
    training_args = SimpleNamespace(per_device_train_batch_size=4, world_size=2, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="the 7 samples are fewer than the 8 of one"):
        _check_sizes([0] * 7, None, training_args)
    with pytest.raises(ValueError, match="eval_mixture has no samples"):
        _check_sizes([0] * 8, [], training_args)


def test_more_frames_than_the_model_has_embeddings():
    data = SimpleNamespace(longest_medium=lambda: 32)
    for fine in (32, None):
        _check_frames(SimpleNamespace(max_num_frames=fine), data)
    with pytest.raises(ValueError, match="32 frames in a medium, and the model embeddings for 16"):
        _check_frames(SimpleNamespace(max_num_frames=16), data)


def test_films_are_asked_about_with_the_frames_of_training(processor):
    data_args = DataArguments("t.yaml", num_frames=8)
    assert _carry_frames(processor, data_args, SimpleNamespace(shows_films=lambda: False)) is None
    assert processor.num_frames is None
    assert _carry_frames(processor, data_args, SimpleNamespace(shows_films=lambda: True)) == processor.num_frames == 8
    told = _farewell(SimpleNamespace(lora=False), SimpleNamespace(output_dir="out", trainable_only=False), 8)
    assert told.endswith("next: otter-hf chat out --video FILM --num-frames 8")


def test_what_measures_or_trains_something_else_than_it_seems(caplog):
    config = SimpleNamespace(max_num_frames=8, get_text_config=lambda: SimpleNamespace(max_position_embeddings=8))
    data_args = SimpleNamespace(max_length=8, eval_fraction=0.0, use_task_description=False)
    entry = SimpleNamespace(task_description=[])
    films = SimpleNamespace(task_groups=["VIDEO_TEXT"], entries=[entry], digest=lambda: "films")
    _tell(config, data_args, films, SimpleNamespace(digest=lambda: "others"))
    assert not caplog.records
    config.max_num_frames = None
    entry.task_description = ["Look."]
    _tell(config, data_args, films, films)
    assert "has task_description, which nothing reads" in caplog.text
    assert "sees the frames of a film, but not their order" in caplog.text
    assert "eval_mixture is what is trained on" in caplog.text


@pytest.mark.parametrize(("steps", "every"), [(9, 1), (20, 1), (100, 5), (20_000, 1000)])
def test_about_twenty_values_are_logged_whatever_the_length(steps, every):
    state = TrainerState()
    state.compute_steps(parse_arguments([*FLAGS, "--use_cpu", "True"])[2], steps)
    assert state.logging_steps == every


def test_several_values_of_an_argument_that_takes_one():
    with pytest.raises(ValueError, match="--train_mixture takes one value, and is given a, b; several datasets stand"):
        parse_arguments(["--train_data", "a", "b"])
    with pytest.raises(ValueError, match="--seed takes one value, and is given 1, 2.$"):
        parse_arguments(["--seed", "1", "2"])
