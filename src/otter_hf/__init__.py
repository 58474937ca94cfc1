"""Otter, Flamingo and OtterHD as native Hugging Face models.

Importing the package registers every family with the Auto classes of transformers, at once where transformers is
loaded and else the moment it is: by itself the package loads neither transformers nor torch, so that a command can
say how it is used without the seconds they take.
"""

import importlib
from typing import TYPE_CHECKING

from .importing import install


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
        Skill,
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
    "Skill",
]


def __getattr__(name: str):
    if name == "models" or name in __all__:
        models = importlib.import_module(".models", __name__)
        return models if name == "models" else getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
