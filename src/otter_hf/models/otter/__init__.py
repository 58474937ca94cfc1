"""Otter: a Flamingo with `<answer>`; configuration, model and processor."""

from .configuration_otter import OtterConfig
from .modeling_otter import OtterForConditionalGeneration, OtterModel
from .processing_otter import OtterProcessor


__all__ = ["OtterConfig", "OtterForConditionalGeneration", "OtterModel", "OtterProcessor"]
