"""What tells one model, and one processor, from another, whatever folder or machine they are on."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin


# of a configuration, what changes no number, or is told by the weights' own dtype
_UNIMPORTANT = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
# of an image processor, what says who reads
_READERS = ("image_processor_type", "processor_class", "return_tensors", "device", "data_format")


def fingerprint_of(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, str]:
    """What `fingerprint_of_model` and `fingerprint_of_processor` say, as one."""
    return {**fingerprint_of_model(model), **fingerprint_of_processor(processor)}


def fingerprint_of_model(model: PreTrainedModel) -> dict[str, str]:
    """
    `dtype`, `configuration` and `weights` of a model, each as a word.

    Raises:
        ValueError: for weights that are not in memory, which cannot be read here.
    """
    configuration = json.dumps(_without(model.config.to_dict(), _UNIMPORTANT), sort_keys=True, default=str)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "configuration": _digest(configuration),
        "weights": digest_of_weights([model]),
    }


def fingerprint_of_processor(processor: ProcessorMixin) -> dict[str, str]:
    """`chat template`, `tokenizer` and `image processor`, each as a word."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    pictures = _without(processor.image_processor.to_dict(), ("_", *_READERS))
    return {
        "chat template": _digest(json.dumps(processor.chat_template)),
        "tokenizer": _digest(json.dumps(vocabulary)),
        "image processor": _digest(json.dumps(pictures, sort_keys=True, default=str)),
    }


def digest_of_weights(modules: Iterable[nn.Module]) -> str:
    """
    A checksum (XXH3) of the names, shapes, dtypes and values of all weights, which are read for it.

    Raises:
        ValueError: as `fingerprint_of_model`.
    """
    digest = xxhash.xxh3_128()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.device.type == "meta":
                raise ValueError(f"The weights {name} are offloaded: load the model into memory to tell which it is.")
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(bytes_of_tensor(tensor))
    return digest.hexdigest()


def bytes_of_tensor(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor's values, uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _without(config, names: tuple[str, ...]):
    """A nested configuration without the fields of these names, or that begin with `_` if that is among them."""
    if isinstance(config, dict):
        return {
            key: _without(value, names)
            for key, value in config.items()
            if key not in names and not (isinstance(key, str) and key.startswith("_") and "_" in names)
        }
    return [_without(item, names) for item in config] if isinstance(config, (list, tuple)) else config


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
