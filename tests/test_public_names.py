"""What a package says it has is there, and says what it is."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import otter_hf


ROOT = Path(otter_hf.__file__).parent
PACKAGES = [
    "otter_hf",
    "otter_hf.conversion",
    "otter_hf.data",
    "otter_hf.data.pretraining",
    "otter_hf.data.sources",
    "otter_hf.files",
    "otter_hf.models.flamingo",
    "otter_hf.models.mpt",
    "otter_hf.models.otter",
    "otter_hf.models.otterhd",
    "otter_hf.production.convert_it",
    "otter_hf.production.syphus",
    "otter_hf.testing",
    "otter_hf.training",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_of_a_package_are_there_and_documented(package):
    package = importlib.import_module(package)
    assert package.__doc__ and package.__all__
    for name in package.__all__:
        thing = getattr(package, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{package.__name__}.{name}"


def undocumented(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Public classes, functions and methods below a node without a docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
            # a method of a class with a parent may replace one, and is documented there
            if not ast.get_docstring(child) and not getattr(node, "bases", ()):
                yield ".".join((*names, child.name))
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, (*names, child.name))


def test_public_names_of_all_modules_are_documented():
    for path in sorted(ROOT.rglob("*.py")):
        missing = list(undocumented(ast.parse(path.read_text(encoding="utf-8"))))
        assert not missing, path
