"""The YAML of a pretraining: which sets of shards to train on, and how."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import did_you_mean
from ...reading import load_yaml
from ...storage import is_one_path, is_remote
from .samples import KINDS, ImageTextPairs, InterleavedDocuments
from .shards import expand_shards, shard_sizes


@dataclass
class PretrainingSet:
    """
    A set of shards; each step of training has a batch of each set.

    Args:
        name: a label, for logs and messages.
        kind: `"pairs"` (LAION, CC3M, CC12M, img2dataset) or `"interleaved"` (MMC4).
        shards: see `expand_shards`.
        batch_size: samples of a batch, on each device.
        loss_weight: of the set's mean loss in the loss of a step; 2023 had 1.0 for MMC4 and 0.2 for LAION.
        num_samples: of an epoch, over all devices; by default as many as the longest set has, see `PretrainingStream`.
        resampled: draw shards with replacement, in place of each sample once before any comes again.
        weights: with `resampled` and a list of `shards`, the share of samples from each of its items; only ratios
            count. By default each shard has the same chance.
        options: of `ImageTextPairs` or `InterleavedDocuments`, by name.

    Raises:
        ValueError: naming the set and the setting that is wrong, or the shard that is not there.
    """

    name: str
    kind: str
    shards: str | Path | Sequence[str | Path]
    batch_size: int = 8
    loss_weight: float = 1.0
    num_samples: int | None = None
    resampled: bool = False
    weights: Sequence[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _check(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(map(repr, KINDS))}, got {self.kind!r}.")
        for name in ("batch_size", "num_samples"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if not isinstance(self.loss_weight, (int, float)) or not self.loss_weight > 0:
            raise ValueError(f"loss_weight must be above 0, got {self.loss_weight!r}: leave a set out instead.")
        known = [option.name for option in fields(KINDS[self.kind])]
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"{option!r} is no setting of {self.kind}; {did_you_mean(option, [*_SETTINGS, *known])}"
                )
        self.builder: ImageTextPairs | InterleavedDocuments = KINDS[self.kind](**self.options)
        sources = [self.shards] if is_one_path(self.shards) else list(self.shards)
        paths = [expand_shards(source) for source in sources]
        self.paths = [path for of_source in paths for path in of_source]
        self.sizes = shard_sizes(self.paths)
        self.shard_weights = None
        if self.weights is not None:
            self.shard_weights = self._weights_of_shards([len(of_source) for of_source in paths])

    def _weights_of_shards(self, counts: list[int]) -> list[float]:
        weights = list(self.weights)
        if not self.resampled:
            raise ValueError("weights need resampled: true, since otherwise each sample comes once.")
        if len(weights) != len(counts) or not all(w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"weights must be {len(counts)} numbers, one for each item of shards, got {weights}.")
        shares, start = [], 0
        for weight, count in zip(weights, counts, strict=True):
            # whole shards are drawn, and one of a source with large shards brings more samples
            shares += [weight / max(1, sum(self.sizes[start : start + count]))] * count
            start += count
        return shares


_SETTINGS = [setting.name for setting in fields(PretrainingSet)][1:-1]


def read_pretraining_sets(source: str | Path) -> list[PretrainingSet]:
    """
    Reads the YAML of a pretraining: set name -> the fields of `PretrainingSet`, and the options of its kind. `source`
    is its path, or what would stand in it as a JSON object.

    ```yaml
    mmc4:  {kind: interleaved, shards: "mmc4/{000000000..000000099}.tar", num_samples: 100000, min_similarity: 0.32}
    laion: {kind: pairs, shards: [cc3m, cc12m], num_samples: 100000, loss_weight: 0.2}
    ```

    Paths that are not absolute are looked for in the working directory and beside the YAML.

    Raises:
        ValueError: naming the file, the set and the key which is wrong.
    """
    inline = str(source).lstrip().startswith("{")
    path = Path("train_sets") if inline else Path(source)
    try:
        sets = json.loads(str(source)) if inline else load_yaml(path)
    except OSError:
        raise ValueError(f"The pretraining YAML {path} does not exist.") from None
    except ValueError as error:
        raise ValueError(f"The pretraining YAML {error}") from None
    if not isinstance(sets, dict) or not sets:
        raise ValueError(f"The pretraining YAML {path} must map names of sets to settings, got {sets!r:.80}.")
    try:
        return [_read_set(str(name), settings, path.parent) for name, settings in sets.items()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_set(name: str, settings: Any, folder: Path) -> PretrainingSet:
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must map keys to values, got {settings!r:.80}.")
    settings = {key: value for key, value in settings.items() if value is not None}
    for key in ("kind", "shards"):
        if key not in settings:
            raise ValueError(f"{name} lacks {key!r}.")
    own = {key: value for key, value in settings.items() if key in _SETTINGS}
    shards = own["shards"]
    own["shards"] = [_find(item, folder) for item in shards] if isinstance(shards, list) else _find(shards, folder)
    options = {str(key): value for key, value in settings.items() if key not in _SETTINGS}
    return PretrainingSet(name, options=options, **own)


def _find(shards: Any, folder: Path) -> str:
    if is_remote(str(shards)):
        return str(shards)
    # a pattern is no path: what it stands for is looked for
    try:
        expand_shards(str(shards))
    except ValueError:
        return str(folder / str(shards))
    return str(shards)
