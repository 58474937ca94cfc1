"""Public instruction sets to MIMIC-IT files: one reader per source, one writer for all."""

from .common import (
    Conversation,
    ConversionCounts,
    UnusableConversation,
    made_from,
    write_conversations,
    write_mixture,
)
from .image_text import read_llava, read_lrv, read_m3it, read_svit
from .messages import chats_as_mixture, preferences_as_dataset, read_chats, read_preferences
from .text import read_alpaca, read_lima, read_sharegpt


__all__ = [
    "Conversation",
    "ConversionCounts",
    "UnusableConversation",
    "chats_as_mixture",
    "made_from",
    "preferences_as_dataset",
    "read_alpaca",
    "read_chats",
    "read_lima",
    "read_llava",
    "read_lrv",
    "read_m3it",
    "read_preferences",
    "read_sharegpt",
    "read_svit",
    "write_conversations",
    "write_mixture",
]
