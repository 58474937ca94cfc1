"""The line that installs what is missing: of this environment, and without a package of ours on an index."""

import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from otter_hf import extras


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def metadata(monkeypatch):
    """The extras as they stand in pyproject.toml, whatever is installed, and nothing installed but what is added."""
    extras_of = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [f'{line.split("#")[0].strip()}; extra == "{name}"' for name, of in extras_of.items() for line in of]
    installed = {}

    def version(name):
        if name not in installed:
            raise extras.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(extras, "requires", lambda name: ["torch>=2.9", *lines])
    monkeypatch.setattr(extras, "version", version)
    return installed


def test_the_line_names_what_is_missing(metadata):
    metadata.update(fastapi="0.115", openai="1.0")
    sentence = extras.missing("the page", "demo")
    start, line = sentence.split(": ", 1)
    assert start == "the page needs uvicorn, openai and gradio"
    words = shlex.split(line)
    packages = words[words.index("install") + 1 :]
    assert [Requirement(word).name for word in packages] == ["uvicorn", "openai", "gradio"]
    assert "otter-hf" not in sentence and "[" not in line
    metadata.update(uvicorn="0.40", openai="2.1", gradio="6.20")
    extras.require("the page", "demo")
    # all are there, and one cannot be imported
    assert "fastapi, uvicorn, openai and gradio" in extras.missing("the page", "demo")
    assert "install the package again" in extras.missing("x", "unheard of")
    with pytest.raises(ValueError, match="^--png needs matplotlib: .*pip install 'matplotlib>=3.9'$"):
        extras.require("--png", "plots")


def test_the_line_uses_the_pip_of_this_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.shutil, "which", lambda name: str(tmp_path / "pip"))
    assert extras.pip_install("a b").startswith(f"{shlex.quote(sys.executable)} -m pip install 'a b'")
    monkeypatch.setattr(extras.sys, "executable", str(tmp_path / "python"))
    assert extras.pip_install("a>1") == "pip install 'a>1'"


def test_nothing_sends_a_reader_to_a_package_of_ours_on_an_index():
    """`pip install otter-hf` finds nothing: the package is installed from a clone."""
    for folder in ("src", "docs", "examples", "model_cards"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".ipynb"):
                text = path.read_text(encoding="utf-8")
                assert 'install "otter-hf' not in text and "install 'otter-hf" not in text, path
                assert "install otter-hf" not in text, path
