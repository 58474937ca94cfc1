"""Pretraining data: WebDataset shards of image-caption pairs and interleaved documents, streamed and written."""

from .collator import PretrainingCollator, caption_labels, interleaved_labels
from .order import ShardOrder
from .samples import ImageTextPairs, InterleavedDocuments, PretrainingSample, RejectedSample, interleave
from .sets import PretrainingSet, read_pretraining_sets
from .shards import ShardWriter, expand_shards, shard_sizes, write_sizes
from .stream import PretrainingStream, num_batches


__all__ = [
    "ImageTextPairs",
    "InterleavedDocuments",
    "PretrainingCollator",
    "PretrainingSample",
    "PretrainingSet",
    "PretrainingStream",
    "RejectedSample",
    "ShardOrder",
    "ShardWriter",
    "caption_labels",
    "expand_shards",
    "interleave",
    "interleaved_labels",
    "num_batches",
    "read_pretraining_sets",
    "shard_sizes",
    "write_sizes",
]
