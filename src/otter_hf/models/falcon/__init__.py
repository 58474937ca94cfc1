from .modeling_falcon import OtterFalconModel


__all__ = ["OtterFalconModel"]
