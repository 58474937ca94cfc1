"""Every stop of docs/architecture.md is a file, and a name in it."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", PAGE)


def names(tree: ast.AST, prefix: str = "") -> set[str]:
    """Functions and classes, with those in classes as `Class.name`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize(("file", "name"), STOPS)
def test_stop_exists(file, name):
    path = ROOT / "src" / "otter_hf" / file
    assert name in names(ast.parse(path.read_text(encoding="utf-8")))


def test_a_walk_has_at_most_eight_stops():
    walks = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert len(walks) == 3
    for walk in walks:
        numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", walk, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and 5 <= len(numbers) <= 8
        assert all(f"| {number} | `" in walk for number in numbers)
