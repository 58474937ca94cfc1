"""Which source tensor becomes which tensor of the model; every name on either side is accounted for."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from ..errors import config_told
from ..models.legacy import is_stale_key
from .names import HEAD, Rename
from .report import ConversionReport
from .tensors import ConversionError, LazyTensor, weight_files
from .writer import checksums


@dataclass(frozen=True)
class TensorSource:
    """
    Tensors of one origin.

    Args:
        label: what to call it in the report.
        tensors: by their own names.
        rename: their names -> those of the result.
        ignore: own name -> the reason why it is of no use, or None.
        resize: whether the vocabulary may have another size than the result's, as in a base language model.
        paths: the files behind it, for their checksums.
    """

    label: str
    tensors: dict[str, LazyTensor]
    rename: Rename
    ignore: Callable[[str], str | None] = lambda key: None
    resize: bool = False
    paths: tuple[Path, ...] = ()


def source_files(path: str | Path) -> tuple[Path, ...]:
    """The weight files of a folder, or the file itself."""
    path = Path(path)
    return tuple(weight_files(path)) if path.is_dir() else (path,)


def model_class(config: PreTrainedConfig) -> type:
    """The class with a language-modelling head for a configuration; ConversionError for what sees no pictures."""
    try:
        return AutoModelForImageTextToText._model_mapping[type(config)]
    except KeyError:
        name = f"{config.name_or_path or 'This'} is a {config.model_type!r} model"
        raise ConversionError(f"{name}, which sees no pictures: name an Otter, Flamingo or OtterHD.") from None


def build_meta_model(config: PreTrainedConfig):
    """The model without memory behind its parameters: names and shapes."""
    with torch.device("meta"), config_told(config.name_or_path or config.model_type):
        return model_class(config)(config)


def embedding_name(meta_model) -> str:
    """Name of the input embedding's weight."""
    embeddings = meta_model.get_input_embeddings()
    return next(name for name, module in meta_model.named_modules() if module is embeddings) + ".weight"


def plan_model(
    config: PreTrainedConfig,
    sources: list[TensorSource],
    report: ConversionReport,
    fill: Callable[[str], tuple[LazyTensor, str] | None] = lambda name: None,
) -> dict[str, LazyTensor]:
    """
    The tensors of the model of `config`, each from the first source that has it.

    Args:
        config: of the result. Its `tie_word_embeddings` is switched off if a source has a head of its own.
        sources: in order of precedence.
        report: takes what became of each tensor.
        fill: for a tensor that no source has, a tensor and how it is made, or None.

    Raises:
        ConversionError: if a tensor has a wrong shape, or integers where the model has floating-point numbers.
    """
    meta = build_meta_model(config)
    embedding = embedding_name(meta)
    if config.tie_word_embeddings and any(_has_own_head(source, embedding) for source in sources):
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        report.notes.append("the stored output layer differs from the embeddings, so the two are not tied")
    wanted = {name: tuple(tensor.shape) for name, tensor in meta.state_dict().items()}
    floating = {name for name, tensor in meta.state_dict().items() if tensor.dtype.is_floating_point}
    if config.tie_word_embeddings:
        del wanted[HEAD]

    planned, origin = {}, {}
    for source in sources:
        report.sources[source.label] = checksums(source.paths)
        for key, tensor in source.tensors.items():
            what = f"{source.label}: {key}"
            target = source.rename(key)
            if is_stale_key(key):
                report.unused[what] = "recomputed by today's code"
            elif (reason := source.ignore(key)) is not None:
                report.unused[what] = reason
            elif target == HEAD and HEAD not in wanted:
                report.unused[what] = "equal to the embeddings, which the output layer is tied to"
            elif target in origin:
                report.unused[what] = f"replaced by that of {origin[target]}"
            elif target not in wanted:
                report.unexplained.append(f"{what} has no place in the result")
            else:
                if tensor.dtype.is_floating_point != (target in floating):
                    raise ConversionError(
                        f"{what} holds {str(tensor.dtype).removeprefix('torch.')}, where the model has "
                        f"{'floating-point numbers' if target in floating else 'integers'} ({target})."
                    )
                resizable = source.resize and target in (embedding, HEAD)
                planned[target] = _fit(what, target, tensor, wanted[target], resizable, report)
                origin[target] = source.label
                report.tensors[what] = target
    for name in wanted:
        if name not in planned:
            filled = fill(name)
            if filled is None:
                report.unexplained.append(f"{name} is in none of {', '.join(source.label for source in sources)}")
                report.missing[name] = "in none of the sources"
            else:
                planned[name], report.initialised[name] = filled
    # in the order of the model, so that a file reads like the model
    return {name: planned[name] for name in wanted if name in planned}


def _has_own_head(source: TensorSource, embedding: str) -> bool:
    by_target = {source.rename(key): tensor for key, tensor in source.tensors.items()}
    head, embeddings = by_target.get(HEAD), by_target.get(embedding)
    if head is None or embeddings is None or head.shape != embeddings.shape:
        return head is not None and embeddings is not None
    return not torch.equal(head.load(), embeddings.load())


def _fit(what, target, tensor: LazyTensor, shape, resizable: bool, report: ConversionReport) -> LazyTensor:
    if tensor.shape == shape:
        return tensor
    if not resizable or tensor.shape[1:] != shape[1:]:
        raise ConversionError(
            f"{what} has shape {tensor.shape} where the model has {shape} ({target}); the sources do not belong "
            "together."
        )
    rows, wanted = tensor.shape[0], shape[0]
    if rows > wanted:
        report.notes.append(f"{target}: rows {wanted} to {rows - 1} belong to no token and are dropped")
        return tensor.map(lambda value: value[:wanted], shape)
    report.initialised[f"{target}[{rows}:{wanted}]"] = "the mean of the rows before them"
    return tensor.map(lambda value: torch.cat([value, mean_row(value).expand(wanted - rows, -1)]), shape)


def mean_row(value: torch.Tensor) -> torch.Tensor:
    """`(V, D)` -> `(1, D)`, averaged in float32: where a new token starts nearest to all others."""
    return value.float().mean(dim=0, keepdim=True).to(value.dtype)


def fresh_weights(config: PreTrainedConfig, seed: int) -> Callable[[str], tuple[LazyTensor, str] | None]:
    """
    Random initial values of the resampler and the gated cross-attention blocks, for `fill` of [`plan_model`].

    They follow the model's own initialisation; each depends on `seed` and its name only.
    """
    meta = build_meta_model(config)
    parameters = meta.state_dict()

    def fill(name: str) -> tuple[LazyTensor, str] | None:
        if not name.startswith("model.perceiver.") and ".gated_cross_attn_layer." not in name:
            return None
        shape = tuple(parameters[name].shape)
        return LazyTensor(shape, torch.float32, lambda: _fresh(meta, name, config, seed)), f"random, seed {seed}"

    return fill


def _fresh(meta, name: str, config, seed: int) -> torch.Tensor:
    if name.endswith(("attn_gate", "ff_gate")):
        return torch.full((1,), config.cross_attn_gate_init)
    parent, _, leaf = name.rpartition(".")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        module = meta.get_submodule(parent)
        # of a container's own parameters only; its parts are made under their own names
        twin = _empty_twin(module)
        meta._init_weights(twin)
        return getattr(twin, leaf).detach().clone()


def _empty_twin(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the same class and settings with its own parameters, uninitialised, in memory."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        key: None if value is None else torch.nn.Parameter(torch.empty(value.shape))
        for key, value in module._parameters.items()
    }
    return twin
