"""Otter model configuration (Li et al. 2023, https://huggingface.co/papers/2305.03726)."""

from huggingface_hub.dataclasses import strict

from ..flamingo.configuration_flamingo import FlamingoConfig


@strict
class OtterConfig(FlamingoConfig):
    r"""
    Configuration of [`OtterModel`] and [`OtterForConditionalGeneration`]: a Flamingo whose tokenizer also has
    `<answer>`. The fields are those of [`FlamingoConfig`].
    """

    model_type = "otter"


__all__ = ["OtterConfig"]
