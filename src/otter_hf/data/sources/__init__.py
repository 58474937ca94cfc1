"""Public instruction sets to MIMIC-IT files: one reader per source, one writer for all; imported when first used."""

from ...importing import lazy_names


__all__, __getattr__ = lazy_names(
    __name__,
    {
        "common": (
            *("Conversation", "ConversionCounts", "UnusableConversation"),
            *("origin_of", "write_conversations", "write_mixture"),
        ),
        "image_text": ("read_llava", "read_lrv", "read_m3it", "read_svit"),
        "chats_in_cache": ("chats_as_mixture",),
        "messages": ("preferences_as_dataset", "read_chats", "read_preferences"),
        "text": ("read_alpaca", "read_lima", "read_sharegpt"),
    },
)
