"""Trained weights without the frozen ones: written, and put on the model they were trained on."""

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import config_told
from ..loading import read_model


TRAINABLE_WEIGHTS = "trainable.safetensors"
TRAINABLE_INFO = "trainable.json"


def save_trainable(model: PreTrainedModel, folder: str | Path, output_dir: str | Path | None = None) -> None:
    """
    Writes the configuration of a model and the parameters that are trained, without the frozen ones.

    `trainable.safetensors` holds the weights, `trainable.json` the name of the model they were trained on: of a folder
    its path from `output_dir`, by default the folder itself, so that both can be moved together and no name of this
    machine is pushed with them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(trained, folder / TRAINABLE_WEIGHTS, metadata={"format": "pt"})
    base = model.config.name_or_path
    if Path(base).is_dir():
        with contextlib.suppress(ValueError):  # on another drive of Windows it stays as it is
            base = Path(os.path.relpath(Path(base).resolve(), Path(output_dir or folder).resolve())).as_posix()
    info = {
        "base_model_name_or_path": base,
        "parameters": sum(parameter.numel() for parameter in trained.values()),
        "parameters_of_the_model": model.num_parameters(),
    }
    (folder / TRAINABLE_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def load_trainable(folder: str | Path, base: str | Path | None = None, **kwargs) -> PreTrainedModel:
    """
    The model of a folder that `trainable_only` training wrote: base weights and trained weights put together.

    `load_trainable(folder).save_pretrained(other)` makes a folder that loads like any other.

    Args:
        folder: a checkpoint or the output folder of the training.
        base: folder or Hub id of the model that was trained, if it is not where it was then.
        kwargs: for `from_pretrained` of the base, such as `dtype` or `device_map`.

    Raises:
        ValueError: if the folder was not written by such a training, or its base is gone or another model.
    """
    folder = Path(folder)
    if not (folder / TRAINABLE_INFO).is_file():
        raise ValueError(f"{folder} has no {TRAINABLE_INFO}: load it with from_pretrained, it is a whole model.")
    if base is None:
        base = _base_of_trainable(folder)
    with config_told(folder):
        config = AutoConfig.from_pretrained(folder)
    model = read_model(str(base), config=config, **kwargs)
    read_trainable(model, folder)
    return model


def _base_of_trainable(folder: Path) -> str:
    """The folder or Hub id of the model that was trained, as `trainable.json` says it."""
    base = json.loads((folder / TRAINABLE_INFO).read_text(encoding="utf-8"))["base_model_name_or_path"]
    # from the output folder, which a checkpoint is in
    starts = [folder.parent, folder] if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else [folder]
    for start in starts:
        if (start / base).is_dir():
            return str((start / base).resolve())
    if base.startswith(".") or Path(base).is_absolute():
        raise ValueError(f"{folder} was trained on {base}, which is gone: say where that model is with base=.")
    return base


def read_trainable(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Puts the weights of `trainable.safetensors` into a model, in place.

    Raises:
        ValueError: for a weight that the model has not, or has in another shape.
    """
    trained = load_file(Path(folder) / TRAINABLE_WEIGHTS)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in trained.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"{folder} holds {name} {tuple(tensor.shape)}, which {model.config.name_or_path!r} has not: load "
                    "it on the model it was trained on."
                )
            parameters[name].copy_(tensor)
