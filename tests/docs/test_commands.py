"""The documentation: `otter-hf` takes its commands, its blocks are what they say, its links lead somewhere."""

import functools
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from otter_hf.cli import build_parser
from otter_hf.training.arguments import DataArguments, ModelArguments, PretrainingDataArguments, TrainingArguments


ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
KINDS = (ModelArguments, DataArguments, PretrainingDataArguments, TrainingArguments)
TRAINING_FLAGS = {"plan"} | {field.name for arguments in KINDS for field in fields(arguments)}


def commands(page: Path) -> list[str]:
    """The `otter-hf` commands of a page's code blocks, with their continuation lines, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash|shell)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^ {4}otter-hf .*$", text, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("otter-hf ")]


COMMANDS = [(page.name, line) for page in (*PAGES, *CARDS) for line in commands(page)]


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_parses(page, line):
    words = shlex.split(line.replace("PRICE", "1").replace("...", ""), comments=True)[1:]
    words = [word for word in words if word != "&"]  # in the background
    if "--help" in words:
        with pytest.raises(SystemExit, match="^0$"):
            build_parser().parse_args(words)
        return
    arguments, rest = build_parser().parse_known_args(words)
    if words[0] in ("train", "pretrain"):
        flags = {word.removeprefix("--") for word in words if word.startswith("--")}
        assert flags <= TRAINING_FLAGS
    else:
        assert not rest
    assert callable(arguments.func)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_in_their_language(page):
    python = functools.partial(compile, filename=page.name, mode="exec")
    # `bash` and `python` run as they stand (tests/docs/walk.py), `shell` and `py` with the reader's own files
    readers = {"yaml": yaml.safe_load, "json": json.loads, "python": python, "py": python}
    readers |= dict.fromkeys(("bash", "shell", "text", ""), str)
    for language, text in re.findall(
        r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        readers[language](text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[2:]:
        assert f"(docs/{page.name})" in readme, page.name


def test_memory_in_the_readme_is_that_of_the_recipes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+\.yaml)` \| ([\d.]+) GiB", readme)
    assert len(rows) == 6
    for recipe, memory in rows:
        text = (ROOT / "examples" / "recipes" / recipe).read_text(encoding="utf-8")
        assert f"computed by the plan: {memory} GiB" in text, recipe
