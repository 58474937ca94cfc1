from .configuration_flamingo import FlamingoConfig
from .modeling_flamingo import FlamingoForConditionalGeneration, FlamingoModel, FlamingoPreTrainedModel


__all__ = ["FlamingoConfig", "FlamingoForConditionalGeneration", "FlamingoModel", "FlamingoPreTrainedModel"]
