"""MPT and MosaicGPT decoders; importing this module makes `model_type: otter_mpt` known to the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mpt import OtterMptConfig
from .modeling_mpt import MOSAIC_GPT_RENAMES, OtterMptForCausalLM, OtterMptModel, OtterMptPreTrainedModel


AutoConfig.register("otter_mpt", OtterMptConfig)
AutoModel.register(OtterMptConfig, OtterMptModel)
AutoModelForCausalLM.register(OtterMptConfig, OtterMptForCausalLM)

__all__ = [
    "MOSAIC_GPT_RENAMES",
    "OtterMptConfig",
    "OtterMptForCausalLM",
    "OtterMptModel",
    "OtterMptPreTrainedModel",
]
