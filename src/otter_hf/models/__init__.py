"""The model families; importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoModel
from .legacy import weight_renamings
from .otter import OtterConfig, OtterForConditionalGeneration, OtterModel


for _config, _model, _conditional in (
    (FlamingoConfig, FlamingoModel, FlamingoForConditionalGeneration),
    (OtterConfig, OtterModel, OtterForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageTextToText.register(_config, _conditional)
    AutoModelForMultimodalLM.register(_config, _conditional)
    register_checkpoint_conversion_mapping(_config.model_type, weight_renamings())

__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoModel",
    "OtterConfig",
    "OtterForConditionalGeneration",
    "OtterModel",
]
