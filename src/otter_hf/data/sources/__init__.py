"""Public instruction sets to MIMIC-IT files: one reader per source, one writer for all."""

from .common import Conversation, ConversionCounts, write_conversations
from .image_text import read_llava, read_lrv, read_m3it, read_svit
from .text import read_alpaca, read_lima, read_sharegpt


__all__ = [
    "Conversation",
    "ConversionCounts",
    "read_alpaca",
    "read_lima",
    "read_llava",
    "read_lrv",
    "read_m3it",
    "read_sharegpt",
    "read_svit",
    "write_conversations",
]
