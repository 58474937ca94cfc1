"""What tells one model, and one processor, from another, whatever folder or machine they are on."""

import hashlib
import json

import torch
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin


# of a configuration, what changes no number, or is told by the weights' own dtype
_UNIMPORTANT = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
# of an image processor, what says who reads
_READERS = ("image_processor_type", "processor_class", "return_tensors", "device", "data_format")


def fingerprint_of_model(model: PreTrainedModel) -> dict[str, str]:
    """
    `dtype`, `configuration` and `weights` of a model, each as a word.

    All bits of all weights count, by the sums of their rows, which cost a reading of the memory they lie in.

    Raises:
        ValueError: for weights that are not in memory, which cannot be read here.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            raise ValueError(f"The weights {name} are offloaded: load the model into memory to tell which one it is.")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_row_sums(tensor.detach()))
    configuration = json.dumps(_without(model.config.to_dict(), _UNIMPORTANT), sort_keys=True, default=str)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "configuration": _digest(configuration),
        "weights": digest.hexdigest(),
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


def _row_sums(tensor: torch.Tensor) -> bytes:
    """The sums of the bits of a tensor's rows, as whole numbers."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)
    # float64 is two columns of 32 bits
    whole = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    return rows.contiguous().view(whole).sum(dim=1, dtype=torch.int64).cpu().numpy().tobytes()


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
