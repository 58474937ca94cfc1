"""Otter, Flamingo and OtterHD as native Hugging Face models.

Importing the package registers every family with the Auto classes of transformers.
"""

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
