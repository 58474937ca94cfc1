from .configuration_otter import OtterConfig
from .modeling_otter import OtterForConditionalGeneration, OtterModel


__all__ = ["OtterConfig", "OtterForConditionalGeneration", "OtterModel"]
