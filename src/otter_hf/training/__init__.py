"""Fine-tuning on MIMIC-IT data with the HF `Trainer`."""

from .checkpoints import load_trainable


__all__ = ["load_trainable"]
