"""No number of any command lifts a limit by being none."""

import argparse

import pytest

from otter_hf.cli import build_parser
from otter_hf.production.syphus import Budget
from otter_hf.serving.settings import ServerSettings


# below 0 they mean something
BELOW_ZERO = {"--model-timeout", "--length-penalty", "--random-sample", "index"}


def number_options(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.Action]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += [(f"{name} {path}".strip(), option) for path, option in number_options(inner)]
        elif action.type is not None and action.nargs in (None, "?"):
            try:
                is_number = isinstance(action.type("2"), (int, float))
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                is_number = isinstance(action.type("0.5"), float)
            if is_number:
                found.append(("", action))
    return found


OPTIONS = number_options(build_parser())


def test_numbers_that_are_none():
    assert len(OPTIONS) > 60
    for command, action in OPTIONS:
        name = action.option_strings[0] if action.option_strings else action.dest
        for text in ("nan", "inf", "-inf", "-1", "x"):
            if text == "-1" and name in BELOW_ZERO:
                continue
            with pytest.raises((ValueError, argparse.ArgumentTypeError)):
                pytest.fail(f"{command} {name} takes {text}: {action.type(text)}")
        if action.default is not None:
            assert action.type(str(action.default)) == action.default


def test_the_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["syphus", "run", "x", "--max-cost", "nan"])
    assert ended.value.code == 2
    assert "argument --max-cost: 'nan' is no number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["max_requests", "max_tokens", "max_cost", "prompt_price", "completion_price"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_budget(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number of at least 0"):
        Budget(**{"prompt_price": 1.0, name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0])
def test_server_settings(value):
    with pytest.raises(ValueError, match="request_seconds must be more than 0"):
        ServerSettings(request_seconds=value)
