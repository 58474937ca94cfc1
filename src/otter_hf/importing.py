"""
How names are found: in packages whose modules are imported when they are first used, and by two finders of Python's
import system, of which one registers the families behind transformers and one knows modules of 2023.
"""

import functools
import importlib
import importlib.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


# packages of 2023 that are not installed by anybody today, and what to write in their place
_LINE = "from otter_hf import OtterForConditionalGeneration, OtterProcessor"
_OF_2023 = {
    "otter_ai": _LINE,
    "otter": _LINE,
    "flamingo": "from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor",
}


class BehindTransformers(importlib.abc.MetaPathFinder):
    """
    Registers the families as soon as transformers has been executed. If it is loaded by a module of ours, they wait
    until that module is complete: they may import it.
    """

    def __init__(self):
        self._modules_at_work = 0
        self._transformers_is_there = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers" and not fullname.startswith("otter_hf."):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)
        return spec

    def _execute(self, execute, module):
        is_ours = module.__name__ != "transformers"
        self._modules_at_work += is_ours
        try:
            execute(module)
        finally:
            self._modules_at_work -= is_ours
        self._transformers_is_there |= not is_ours
        if self in sys.meta_path and self._transformers_is_there and not self._modules_at_work:
            sys.meta_path.remove(self)
            importlib.import_module("otter_hf.models")


class ModulesOf2023(importlib.abc.MetaPathFinder):
    """The last to be asked: says what replaces a module of 2023, where no other finder has one of that name."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _OF_2023:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: it is of 2023, today write `{_OF_2023[fullname]}`.",
                name=fullname,
            )
        return None


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package, by the names that are imported from a module of it on first use."""
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return sorted(homes), find


def install() -> None:
    """Register the families now or behind transformers; from now on modules of 2023 are known by name."""
    sys.meta_path.append(ModulesOf2023())
    if "transformers" in sys.modules:
        importlib.import_module("otter_hf.models")
    else:
        sys.meta_path.insert(0, BehindTransformers())
