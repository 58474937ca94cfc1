"""Fine-tuning on MIMIC-IT data with the HF `Trainer`."""

from ..importing import lazy_names


__all__, __getattr__ = lazy_names(__name__, {"trainable": ("load_trainable",)})
