"""The model families; importing this package registers them with the Auto classes."""

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .flamingo import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoModel, FlamingoProcessor
from .legacy import mosaic_gpt_renamings, weight_renamings
from .mpt import OtterMptConfig, OtterMptForCausalLM, OtterMptModel
from .otter import OtterConfig, OtterForConditionalGeneration, OtterModel, OtterProcessor
from .otterhd import (
    OtterHDConfig,
    OtterHDForConditionalGeneration,
    OtterHDImageProcessor,
    OtterHDModel,
    OtterHDProcessor,
)
from .skills import Skill
from .varlen_attention import varlen_mask, varlen_sdpa_attention_forward


AttentionInterface.register("varlen_sdpa", varlen_sdpa_attention_forward)
AttentionMaskInterface.register("varlen_sdpa", varlen_mask)
for _config, _model, _conditional, _processor in (
    (FlamingoConfig, FlamingoModel, FlamingoForConditionalGeneration, FlamingoProcessor),
    (OtterConfig, OtterModel, OtterForConditionalGeneration, OtterProcessor),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # the first is where TRL looks for a model that it is given by name
    for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _auto_class.register(_config, _conditional)
    AutoProcessor.register(_config, _processor)
    register_checkpoint_conversion_mapping(_config.model_type, weight_renamings())
# a mapping of its own, which holds below the language model only: Falcon has an `ln_f` too, under the same 2023 prefix
register_checkpoint_conversion_mapping(OtterMptConfig.model_type, mosaic_gpt_renamings())

# as of the package itself, which lists them without loading them, for those who read types
# pylint: disable=duplicate-code
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
