"""The model families; importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoModel, FlamingoProcessor
from .legacy import weight_renamings
from .otter import OtterConfig, OtterForConditionalGeneration, OtterModel, OtterProcessor


for _config, _model, _conditional, _processor in (
    (FlamingoConfig, FlamingoModel, FlamingoForConditionalGeneration, FlamingoProcessor),
    (OtterConfig, OtterModel, OtterForConditionalGeneration, OtterProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageTextToText.register(_config, _conditional)
    AutoModelForMultimodalLM.register(_config, _conditional)
    AutoProcessor.register(_config, _processor)
    register_checkpoint_conversion_mapping(_config.model_type, weight_renamings())

__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "FlamingoProcessor",
    "OtterConfig",
    "OtterForConditionalGeneration",
    "OtterModel",
    "OtterProcessor",
]
