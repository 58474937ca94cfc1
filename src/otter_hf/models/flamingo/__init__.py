"""Flamingo: configuration, model and processor."""

from .configuration_flamingo import FlamingoConfig
from .modeling_flamingo import FlamingoForConditionalGeneration, FlamingoModel, FlamingoPreTrainedModel
from .processing_flamingo import FlamingoProcessor


__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "FlamingoPreTrainedModel",
    "FlamingoProcessor",
]
