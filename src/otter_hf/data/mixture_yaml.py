"""The training YAML: which MIMIC-IT datasets to train on, in which of the four groups, and how much of each."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers.utils import logging

from ..reading import load_yaml
from ..storage import AnyPath, is_one_path, is_remote, to_path
from .samples import TASK_GROUPS, TEXT_ONLY


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of the training YAML.

    Args:
        task_group: one of `TASK_GROUPS`.
        name: a label of the dataset, for tables and messages.
        mimicit_path: instructions file.
        images_path: image store, or a list of them; see `ImageStore`. Empty for text-only data.
        train_config_path: train config. Empty for none.
        num_samples: how many samples an epoch has of it; -1 or 0 for all. See `sample_rows`.
        task_description: lines of which one may be put before a prompt; one string counts as a list of one.
        images_as: several images of one record as `"frames"` of one medium or as `"media"` of their own.
    """

    task_group: str
    name: str
    mimicit_path: str
    images_path: str | Sequence[str] = ()
    train_config_path: str = ""
    num_samples: int = 0
    task_description: Sequence[str] = ()
    images_as: str = "frames"

    def __post_init__(self):
        where = f"{self.task_group}/{self.name}"
        if self.task_group not in TASK_GROUPS:
            raise ValueError(f"{self.task_group!r} is no task group: use one of {', '.join(TASK_GROUPS)}.")
        for key in ("images_path", "task_description"):
            value = getattr(self, key) or []
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}: {key} must be a string or a list of strings, got {value!r}.")
            object.__setattr__(self, key, list(value))
        if not isinstance(self.mimicit_path, str) or not self.mimicit_path:
            raise ValueError(f"{where}: mimicit_path must name the instructions file, got {self.mimicit_path!r}.")
        if not isinstance(self.train_config_path, str):
            raise ValueError(f"{where}: train_config_path must be a string, got {self.train_config_path!r}.")
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int) or self.num_samples < -1:
            raise ValueError(
                f"{where}: num_samples must be a number of samples, or -1 or 0 for all, got {self.num_samples!r}."
            )
        if self.images_as not in ("frames", "media"):
            raise ValueError(f"{where}: images_as must be 'frames' or 'media', got {self.images_as!r}.")
        for path in (self.mimicit_path, self.train_config_path, *self.images_path):
            if path and not to_path(path).exists():
                raise ValueError(f"{where}: the path {path} does not exist.")


class Problem(NamedTuple):
    """Something wrong with a mixture: an `"error"`, a `"warning"`, or a `"note"` of what is worth knowing."""

    severity: str
    rule: str
    message: str
    task_group: str = ""
    dataset: str = ""


def _raise_or_warn(problem: Problem) -> None:
    if problem.severity == "error":
        raise ValueError(problem.message)
    logger.warning(problem.message)


def read_mixture(
    path: AnyPath,
    report: Callable[[Problem], None] = _raise_or_warn,
    cache_dir: str | Path | None = None,
    on_error: str = "raise",
) -> list[MixtureEntry]:
    """Reads a training YAML: task group -> dataset name -> the fields of `MixtureEntry`.

    Paths in it that are not absolute are looked for in the working directory and beside the YAML file. Any of them,
    and the YAML file itself, may be addresses (`s3://bucket/x.json`). Unknown keys of a dataset and groups without
    datasets are warned of.

    Rows of messages (`.jsonl`, a `.json` list, `.parquet` or a folder of that, see `otter_hf.data.sources.messages`)
    become a dataset in the cache. They may stand under `mimicit_path`, with the folder of the media that they name
    under `images_path`.

    Args:
        path: the YAML file, or rows of messages.
        report: what to do with a problem, by default to raise or to log it. If it returns, reading goes on without
            the group or dataset that is wrong.
        cache_dir: of rows of messages, see `MimicitMixture`.
        on_error: `"raise"`, or `"skip"` rows of messages that no record can keep, or whose pictures are not there,
            with a warning that counts them.

    Returns:
        The datasets, ordered by group as in `TASK_GROUPS` and then as in the file.

    Raises:
        ValueError: naming the file and the group, dataset or key which is wrong.
    """
    path = to_path(path)
    entries = []
    if path.suffix == ".json" or _are_rows(path):
        try:
            return [_entry_of_rows(path, {}, cache_dir, on_error)]
        except (ValueError, OSError) as error:
            report(Problem("error", "messages", str(error)))
            return []
    groups = _read_groups(path, report)
    if groups is None:
        return []
    for group, datasets in groups.items():
        if group not in TASK_GROUPS:
            message = f"{path}: {group!r} is no task group, use one of {', '.join(TASK_GROUPS)}."
            report(Problem("error", "task group", message))
        elif datasets is None:
            report(Problem("warning", "empty group", f"{path}: the group {group} has no datasets.", group))
        elif not isinstance(datasets, dict):
            message = f"{path}: the group {group} must map dataset names to settings, got {datasets!r:.80}."
            report(Problem("error", "task group", message, group))
        else:
            for name, settings in datasets.items():
                try:
                    settings = _settings_of(path, group, str(name), settings, report)
                    settings = {"task_group": group, "name": str(name), "mimicit_path": "", **settings}
                    source = settings["mimicit_path"]
                    if source and isinstance(source, str) and _are_rows(to_path(source)):
                        entries.append(_entry_of_rows(to_path(source), settings, cache_dir, on_error))
                    else:
                        entries.append(MixtureEntry(**settings))
                except (ValueError, OSError) as error:
                    report(Problem("error", "settings", f"{path}: {error}", group, str(name)))
    if not entries:
        report(Problem("error", "no datasets", f"The training YAML {path} names no datasets."))
    return sorted(entries, key=lambda entry: TASK_GROUPS.index(entry.task_group))


def entries_of(
    mixture: AnyPath | Sequence[MixtureEntry], cache_dir: str | Path | None = None, on_error: str = "raise"
) -> list[MixtureEntry]:
    """The datasets of a mixture: those given, or those of a file, see `read_mixture`."""
    return read_mixture(mixture, cache_dir=cache_dir, on_error=on_error) if is_one_path(mixture) else list(mixture)


def _are_rows(path: Path) -> bool:
    """Whether a path is of rows of messages: instructions of MIMIC-IT are an object, not a list."""
    if path.suffix == ".json" and path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.read(64).lstrip().startswith("[")
    return path.suffix in (".jsonl", ".parquet") or path.is_dir()


def _entry_of_rows(path: Path, settings: dict[str, Any], cache_dir: str | Path | None, on_error: str) -> MixtureEntry:
    """The dataset that rows of messages become, with these settings of it."""
    from .sources import chats_as_mixture

    folder = settings.get("images_path") or None
    if settings.get("train_config_path") or (folder and not (isinstance(folder, str) and to_path(folder).is_dir())):
        raise ValueError(
            f"{settings['task_group']}/{settings['name']}: {path} holds rows of messages, which are whole "
            "conversations: leave train_config_path out, and give as images_path the folder of the media they name."
        )
    (entry,) = read_mixture(chats_as_mixture(path, cache_dir, image_folder=folder, on_error=on_error))
    if settings.get("task_group") == TEXT_ONLY and entry.images_path:
        raise ValueError(
            f"{TEXT_ONLY}/{settings['name']}: the rows of {path} have pictures or films, which this group reads none "
            "of: move it to IMAGE_TEXT."
        )
    return replace(entry, **{key: value for key, value in settings.items() if not key.endswith("_path")})


def _read_groups(path: Path, report: Callable[[Problem], None]) -> dict[str, Any] | None:
    try:
        groups = load_yaml(path, _NoDuplicatesLoader)
    except OSError:
        message = f"The training YAML {path} does not exist."
    except ValueError as error:
        message = f"The training YAML {error}"
    else:
        if isinstance(groups, dict):
            return groups
        message = f"The training YAML {path} must map task groups to datasets, got {groups!r:.80}."
    report(Problem("error", "YAML", message))
    return None


def _settings_of(
    path: Path, group: str, name: str, settings: Any, report: Callable[[Problem], None]
) -> dict[str, Any]:
    """What a dataset says, with paths that are found."""
    if not isinstance(settings, dict):
        raise ValueError(f"{group}/{name} must map keys to values, got {settings!r:.80}.")
    known = [field.name for field in fields(MixtureEntry)][2:]
    unknown = [key for key in settings if key not in known]
    if unknown:
        message = f"{path}: {group}/{name} has unknown keys {unknown}, which are ignored; known are {known}."
        report(Problem("warning", "unknown keys", message, group, name))
    # a key without a value is the same as no key
    settings = {key: value for key, value in settings.items() if key in known and value is not None}
    for key in ("mimicit_path", "images_path", "train_config_path"):
        value = settings.get(key)
        if isinstance(value, str):
            settings[key] = _find(value, path.parent)
        elif isinstance(value, list):
            settings[key] = [_find(item, path.parent) if isinstance(item, str) else item for item in value]
    return settings


def _find(value: str, folder: Path) -> str:
    if not value or is_remote(value):
        return value
    beside = folder / value
    if not Path(value).exists():
        return str(beside) if beside.exists() else value
    if not is_remote(beside) and beside.exists() and not beside.samefile(value):
        logger.warning(f"{value} is in the working directory, from where it is taken, and beside the YAML: {beside}.")
    return value


class _NoDuplicatesLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, count in Counter(key for key in keys if isinstance(key, str)).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)
