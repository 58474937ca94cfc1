"""What a command costs before it does anything, and what it says to mistakes."""

import importlib
import subprocess
import sys

import pytest

from otter_hf.cli import SUBCOMMANDS, build_parser, main
from otter_hf.cli.training_help import COMMON
from otter_hf.training.arguments import TrainingArguments


NAMES = [module.__name__.rpartition(".")[2] for module in SUBCOMMANDS]
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate"]


def test_help_of_every_command_loads_nothing_heavy():
    code = f"""
import contextlib, io, sys
from otter_hf.cli import main
for words in [["--help"], ["--version"], *([name, "--help"] for name in {NAMES})]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:
        main(words)
    assert len(output.getvalue()) > 10, words
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_package():
    package = importlib.import_module("otter_hf")
    assert all(isinstance(getattr(package, name), type) for name in package.__all__)
    assert {*package.__all__} <= {*dir(package)}
    with pytest.raises(AttributeError, match="has no attribute 'OtterModle'"):
        package.OtterModle  # noqa: B018


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat m --promt x", "otter-hf chat: there is no --promt, did you mean --prompt?"),
        ("chat m --max_new_tokens 3", "there is no --max_new_tokens, did you mean --max-new-tokens?"),
        ("convert dtype --source a --output b --verfy", "otter-hf convert dtype: there is no --verfy, did you mean"),
        ("data chekc x.yaml", "COMMAND cannot be 'chekc', did you mean check?"),
        ("chta m", "SUBCOMMAND cannot be 'chta', did you mean chat?"),
        ("chat m --dtype bf16", "--dtype cannot be 'bf16', did you mean bfloat16?"),
        ("chat m --dtype nf4x", "--dtype cannot be 'nf4x': use one of auto, float32, bfloat16, float16"),
        ("memory a b", "otter-hf memory: nothing takes 'b' ("),
        ("chat m --image a b", "otter-hf chat: nothing takes 'b': repeat --image in front of each"),
        ("memory", "otter-hf memory: the following arguments are required: config"),
        ("serve m --zzz 1", "otter-hf serve: there is no --zzz (`otter-hf serve --help` says more)"),
    ],
)
def test_mistakes_in_flags_end_in_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(words.split())
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_flags_of_training_have_hints(command, capsys):
    assert main([command, "--model_name_or_path", "m", "--learning_rat", "1"]) == 2
    assert "there is no --learning_rat; did you mean 'learning_rate'?" in capsys.readouterr().err


def test_help_of_training_is_short_first(capsys):
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="^0$"):
            build_parser().parse_args(["train", flag])
    short, full = capsys.readouterr().out.split("usage: ")[1:]
    assert short.count("\n") < 200 < full.count("\n")
    groups = ["model:", "data:", "training:", "training, with transformers:"]
    assert [line for line in short.splitlines() if line in groups] == groups
    for name in ("model_name_or_path", "train_mixture", "logging_steps", "plan", "output_dir"):
        assert f"--{name}" in short
    assert "--adam_beta2" in full
    assert "--adam_beta2" not in short


def test_what_the_short_help_says_of_transformers_is_so():
    known = TrainingArguments.__dataclass_fields__
    assert {name: default for name, (default, _) in COMMON.items()} == {name: known[name].default for name in COMMON}
