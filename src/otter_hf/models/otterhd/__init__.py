"""OtterHD: importing this package makes transformers' Auto classes read every `fuyu` folder with it.

OtterHD checkpoints call themselves `fuyu`. Two ways could make them come out right: repair transformers'
`FuyuConfig` in place, or let the Auto classes read `fuyu` with classes of our own. The second is taken, because it
leaves `FuyuConfig`, `FuyuForCausalLM` and `FuyuProcessor` untouched for those who name them, and because the processor
must be replaced in any case. Configurations that state their RoPE base load with that base; models and saved folders
stay Fuyu in name, weights and numbers.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import processing_auto

from .configuration_otterhd import OtterHDConfig
from .image_processing_otterhd import OtterHDImageProcessor
from .modeling_otterhd import OtterHDForConditionalGeneration, OtterHDModel, OtterHDPreTrainedModel
from .processing_otterhd import OtterHDProcessor


_find_processor_class = processing_auto.processor_class_from_name


def _processor_class_from_name(class_name: str):
    # The files of 2023 name their processor, and a name goes before what is registered for the configuration.
    return OtterHDProcessor if class_name == "FuyuProcessor" else _find_processor_class(class_name)


def register() -> None:
    """Makes the Auto classes read `fuyu` folders with OtterHD's classes; calling it again changes nothing."""
    AutoConfig.register(OtterHDConfig.model_type, OtterHDConfig, exist_ok=True)
    AutoModel.register(OtterHDConfig, OtterHDModel, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(OtterHDConfig, OtterHDForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(OtterHDConfig, OtterHDImageProcessor, exist_ok=True)
    AutoProcessor.register(OtterHDConfig, OtterHDProcessor, exist_ok=True)
    processing_auto.processor_class_from_name = _processor_class_from_name


register()

__all__ = [
    "OtterHDConfig",
    "OtterHDForConditionalGeneration",
    "OtterHDImageProcessor",
    "OtterHDModel",
    "OtterHDPreTrainedModel",
    "OtterHDProcessor",
    "register",
]
