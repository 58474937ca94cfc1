"""
Otter (Li et al. 2023, https://huggingface.co/papers/2305.03726): a Flamingo fine-tuned on MIMIC-IT.

Otter differs from Flamingo in its tokens and its prompt, not in the model.
"""

from ..flamingo.modeling_flamingo import FlamingoForConditionalGeneration, FlamingoModel
from .configuration_otter import OtterConfig


class OtterModel(FlamingoModel):
    """The model without a language-modelling head; see [`FlamingoModel`]."""

    config: OtterConfig


class OtterForConditionalGeneration(FlamingoForConditionalGeneration):
    """Otter with a language-modelling head; see [`FlamingoForConditionalGeneration`]."""

    config: OtterConfig


__all__ = ["OtterForConditionalGeneration", "OtterModel"]
