"""Pretraining data: WebDataset shards of image-caption pairs and interleaved documents, streamed and written.

Names are imported when they are first used: who writes shards needs no models, and begins at once.
"""

from importlib import import_module


_MODULES = {
    "collator": ("PretrainingCollator", "caption_labels", "interleaved_labels"),
    "order": ("ShardOrder",),
    "samples": ("ImageTextPairs", "InterleavedDocuments", "PretrainingSample", "RejectedSample", "interleave"),
    "sets": ("PretrainingSet", "read_pretraining_sets"),
    "shards": ("ShardWriter", "expand_shards", "shard_sizes", "write_sizes"),
    "stream": ("PretrainingStream", "num_batches"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
