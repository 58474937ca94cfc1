"""Pretraining data: WebDataset shards of image-caption pairs and interleaved documents, streamed and written.

Names are imported when they are first used: who writes shards needs no models, and begins at once.
"""

from ...importing import lazy_names


__all__, __getattr__ = lazy_names(
    __name__,
    {
        "collator": ("PretrainingCollator", "caption_labels", "interleaved_labels"),
        "order": ("ShardOrder",),
        "samples": ("ImageTextPairs", "InterleavedDocuments", "PretrainingSample", "RejectedSample", "interleave"),
        "sets": ("PretrainingSet", "read_pretraining_sets"),
        "shards": ("ShardWriter", "expand_shards", "shard_sizes", "write_sizes"),
        "stream": ("PretrainingStream", "num_batches"),
    },
)
