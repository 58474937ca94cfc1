"""Fine-tuning on MIMIC-IT data with the HF `Trainer`."""

__all__ = ["load_trainable"]


def __getattr__(name: str):
    if name != "load_trainable":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .checkpoints import load_trainable

    return load_trainable
