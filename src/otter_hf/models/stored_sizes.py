"""
A model is as large as its weights: a `config.json` that asks for far more is refused before that memory is taken.

transformers itself gives room to all that a configuration describes, fills with random numbers what the weight files
do not hold, and tells of it then.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict

from .legacy import name_lora_layers


# fields by which layers are made, one after the other
_DEPTH = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|((perceiver|resampler)_)?depths?")
# where no weights are at hand; networks have a thousand at most
_MOST_LAYERS = 10_000
# that are made in no time, for weights of which most are left out on purpose
_FEW_LAYERS = 1_000
# fields that become a side of a tensor, and what none reaches: of larger ones torch cannot even tell the size
_SIDE = re.compile(r"size|dim|heads|latents|frames|channels|width|d_model|embd|ffn|mult|vocab")
_MOST_SIDE = 2**28
# that may be filled with random numbers before it is told: not more than the weights take, or this
_SLACK_BYTES = 2**28
_FIX = "write what the weights have there, or fetch config.json and weights again, together"


def refuse_impossible(config_dict: Mapping[str, Any], name_or_path: str | Path | None) -> None:
    """
    Raises ValueError for more layers than there are tensors in the weights: not only do models make them one by one,
    many configurations make a list of that length; for sizes that no model has, and for numbers that are none.

    Args:
        config_dict: a parsed `config.json`.
        name_or_path: its folder; of anything else, and without weights, a large number of layers is the limit.
    """
    name = name_or_path or "The config.json"
    for field, value in _numbers(config_dict, float):
        if math.isnan(value):
            raise ValueError(f"{name} cannot be used: {field} is {value} in its config.json: write a number there.")
    stored = _count_tensors(Path(name_or_path)) if name_or_path else None
    held = "" if stored is None else f"; its weights are {stored} tensors in all"
    for (field, value), most in (
        (_largest(config_dict, _DEPTH.fullmatch), _MOST_LAYERS if stored is None else max(stored, _FEW_LAYERS)),
        (_largest(config_dict, _SIDE.search), _MOST_SIDE),
    ):
        if value > most:
            raise ValueError(
                f"{name} cannot be used: {field} is {value}, where {most} is the most that can be{held}: {_FIX}."
            )


def refuse_other_sizes(
    model: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    files: Sequence[str | Path] | None,
    loading: LoadStateDictConfig,
    expected_keys: Sequence[str] | None = None,
) -> None:
    """
    Raises ValueError for a model that asks for far more memory than its weights fill.

    Differences within what the weights take, or 256 MB, are left to be told in full behind the loading.

    Args:
        model: on the meta device; what has memory already is not looked at.
        state_dict, files: what is loaded, the one or the other.
        loading: how names are translated, and whether weights are quantised.
        expected_keys: the part of the model that is loaded; by default all.
    """
    stored = _stored_shapes(files or (), loading.weights_only) if state_dict is None else state_dict
    if getattr(model.config, "lora_config", None) is not None:
        stored = name_lora_layers(stored, model.config.lora_config)
    tensors = model.state_dict()
    wanted = {key: tensors[key] for key in expected_keys or tensors if key in tensors and tensors[key].is_meta}
    other, missing = _differences(model, wanted, stored, loading)
    # angles of positions and their like are in no file
    wanted |= {key: table for key, table in model.named_non_persistent_buffers() if table.is_meta}
    made_up = {key: _bytes(wanted[key]) for key in wanted if key in other or key in missing or key not in tensors}
    total = sum(made_up.values())
    if total <= max(sum(map(_bytes, stored.values())), _SLACK_BYTES):
        return
    worst = max(made_up, key=lambda key: (key in other, made_up[key]))
    shape, config = list(wanted[worst].shape), model.config.to_dict()
    # of a layer that is one too many, or by itself
    alike = re.compile(re.sub(r"\d+", r"\\d+", re.escape(worst)))
    if worst in missing and any(alike.fullmatch(key) for key in wanted.keys() - missing):
        field = "{} is {}".format(*_largest(config, _DEPTH.fullmatch))
    else:
        field = _field_of(config, shape, other.get(worst, [1] * len(shape)))
    if worst in other:
        holds = f"the weights hold {worst} as {other[worst]} and not as {shape}"
    else:
        holds = f"that is {total / 1e9:.1f} GB which the weights do not hold, such as {worst} of {shape}"
    name = loading.pretrained_model_name_or_path
    raise ValueError(f"{name} cannot be used: {field} in its config.json, but {holds}: {_FIX}.")


def _differences(
    model: PreTrainedModel,
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, torch.Tensor],
    loading: LoadStateDictConfig,
) -> tuple[dict[str, list[int]], set[str]]:
    """Names of tensors that are stored in another shape, with this shape, and of those that are not stored."""
    mapping = copy.deepcopy(loading.weight_mapping or [])  # it keeps what it was used for
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found, other, is_told_by_name = set(), {}, bool(stored) and loading.hf_quantizer is None
    for name, tensor in stored.items():
        key, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        key = name if key not in wanted and name in wanted else key
        is_told_by_name &= converter is None  # else several become one, or one several
        if key not in wanted:
            continue
        found.add(key)
        if loading.hf_quantizer is not None:
            fits = wanted[key].numel() <= 8 * _bytes(tensor)  # no weight takes less than a bit
        else:
            fits = wanted[key].shape == tensor.shape
        if converter is None and not fits:
            other[key] = list(tensor.shape)
    for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        found |= {key, source} if key in found else {key}
    return other, wanted.keys() - found if is_told_by_name else set()


def _field_of(config: Mapping[str, Any], wanted: list[int], stored: list[int]) -> str:
    """The field that made a dimension larger than the stored one, itself or as a factor, in words with its value."""
    larger = [pair for pair in zip(wanted, stored, strict=False) if pair[0] > pair[1]]
    sizes = [(value, field) for field, value in _numbers(config) if value > min(stored, default=0)]
    factors = [one for one in sizes if any(one[0] > held and size % one[0] == 0 for size, held in larger)]
    # as it is, then as a factor, then (patches of an image) in another way
    exact = [one for one in factors if any(one[0] == size for size, _ in larger)]
    value, field = max(exact or factors or [one for one in sizes if "size" in one[1]], default=(0, ""))
    return f"{field} is {value}" if field else "a size is wrong"


def _largest(config: Mapping[str, Any], is_meant: Callable[[str], Any]) -> tuple[str, int]:
    """The largest number in the fields whose name is meant, with its place."""
    meant = (one for one in _numbers(config) if is_meant(re.sub(r"(.*\.|\[\d+\]$)", "", one[0])))
    return max(meant, key=lambda one: one[1], default=("", 0))


def _numbers(value: Any, kind: type = int, path: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a kind in a parsed `config.json`, each with its place, such as `text_config.vocab_size`."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, kind, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            yield from _numbers(one, kind, f"{path}[{place}]")
    elif type(value) is kind:
        yield path, value


def _count_tensors(folder: Path) -> int | None:
    """How many tensors the weights of a folder are, as transformers finds them; None if that cannot be told."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        try:
            if (folder / name).is_file():
                return len(_stored_shapes([folder / name])) or None
            if index.is_file():
                return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) or None
        except Exception:  # whatever its bytes make of the reader; who loads it tells what is wrong
            return None
    return None


def _stored_shapes(files: Sequence[str | Path], weights_only: bool = True) -> dict[str, torch.Tensor]:
    """The tensors in weight files, on the meta device; of files of `torch.save` before PyTorch 1.6 nothing is told."""
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        if Path(file).suffix == ".safetensors" or is_zipfile(file):
            stored |= load_state_dict(file, map_location="meta", weights_only=weights_only)
    return stored


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
