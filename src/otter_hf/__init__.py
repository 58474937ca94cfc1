"""Otter, Flamingo and OtterHD as native Hugging Face models.

Importing the package registers every family with the Auto classes of transformers, at once where transformers is
loaded and else the moment it is: by itself the package loads neither transformers nor torch, so that a command can
say how it is used without the seconds they take.
"""

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .models import (
        FlamingoConfig,
        FlamingoForConditionalGeneration,
        FlamingoModel,
        FlamingoProcessor,
        OtterConfig,
        OtterForConditionalGeneration,
        OtterHDConfig,
        OtterHDForConditionalGeneration,
        OtterHDImageProcessor,
        OtterHDModel,
        OtterHDProcessor,
        OtterModel,
        OtterMptConfig,
        OtterMptForCausalLM,
        OtterMptModel,
        OtterProcessor,
    )


__version__ = "0.1.0.dev0"

__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "FlamingoProcessor",
    "OtterConfig",
    "OtterForConditionalGeneration",
    "OtterHDConfig",
    "OtterHDForConditionalGeneration",
    "OtterHDImageProcessor",
    "OtterHDModel",
    "OtterHDProcessor",
    "OtterModel",
    "OtterMptConfig",
    "OtterMptForCausalLM",
    "OtterMptModel",
    "OtterProcessor",
]


def __getattr__(name: str):
    if name == "models" or name in __all__:
        models = importlib.import_module(".models", __name__)
        return models if name == "models" else getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _BehindTransformers(importlib.abc.MetaPathFinder):
    """Finds transformers as the other finders do, and registers the families as soon as it has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                importlib.import_module(".models", __name__)

            spec.loader.exec_module = execute_and_register
        return spec


if "transformers" in sys.modules:
    importlib.import_module(".models", __name__)
else:
    sys.meta_path.insert(0, _BehindTransformers())
