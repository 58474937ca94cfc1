"""One check of what is given as a model, everywhere: is it a folder with a model, or a model of the Hub within reach?

Without it each library below answers in its own way and time: transformers looks for a mistyped folder on the Hub,
and tries for minutes where there is no network.
"""

import difflib
import json
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit


_CONFIGS = ("config.json", "adapter_config.json")
# in which a connection must be there: waiting longer tells nobody anything new
_SECONDS = 1.5


def check_model_name(
    name: str | Path, argument: str = "model", *, weights: bool = False, config: bool = True, ask_hub: bool = True
) -> None:
    """
    Raises ValueError, in less than two seconds where nothing answers, unless `name` is a model.

    Args:
        name: a folder, or a Hub id (`owner/name`); a revision may follow an `@`.
        argument: what the user calls it, for the sentence.
        weights: a folder must have the weights, too.
        config: there must be a `config.json`; False for what has tokenizer files only.
        ask_hub: False looks at nothing but the name and this machine, and takes every Hub id for one that exists.

    Raises:
        ValueError: saying what is missing in the folder, which folder may have been meant, or why the Hub has no such
            model.
    """
    path, revision = split_revision(str(name))
    given = f"{argument} {str(name)!r}"
    folder = Path(path)
    if folder.is_dir():
        problem = _problem_of(folder, weights) if config else ""
    elif folder.exists():
        problem = "is a file; give the folder with config.json and the weights"
    elif path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or not _is_hub_id(path):
        problem = f"is neither a folder here nor a Hub id (owner/name){_nearest(folder)}"
    else:
        problem = _problem_on_the_hub(path, revision, config) if ask_hub else ""
    if problem:
        raise ValueError(f"{given} {problem}" + "." * (not problem.endswith("?")))


def split_revision(name: str) -> tuple[str, str]:
    """Path and revision of `path` or `path@revision`."""
    if Path(name).exists() or "@" not in name:
        return name, "main"
    path, _, revision = name.rpartition("@")
    return path, revision


def _is_hub_id(path: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def _problem_of(folder: Path, weights: bool) -> str:
    """What a folder lacks to be a model; empty if nothing."""
    if not any((folder / name).is_file() for name in _CONFIGS):
        inner = sorted(entry.parent for name in _CONFIGS for entry in folder.glob(f"*/{name}"))
        if inner:
            # the last checkpoint, not the last by name
            best = max(inner, key=lambda one: (len(one.name), one.name) if "-" in one.name else (0, one.name))
            return f"holds no config.json, but {str(best)!r} does: give that"
        checkpoints = sorted(entry.name for entry in folder.glob("*.pt"))
        if checkpoints:
            return f"holds no config.json, but {checkpoints[0]}: make a folder of it with `otter-hf convert`"
        files = sorted(entry.name for entry in folder.iterdir())
        there = f"only {', '.join(files[:4])}{', ...' if len(files) > 4 else ''}" if files else "nothing at all"
        return f"holds no config.json, but {there}: give the folder of a model{_nearest(folder)}"
    if not weights or (folder / "adapter_config.json").is_file():
        return ""
    # transformers reads the first of these; of the other an index may lie about without its files
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return ""
        if not index.is_file():
            continue
        try:
            shards = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            return ""  # who reads it says what is wrong with it
        missing = [shard for shard in shards if not (folder / str(shard)).is_file()]
        if missing:
            return f"lacks {missing[0]}, one of {len(shards)} files of weights that {index.name} names: copy it there"
        return ""
    if (folder / "trainable.json").is_file():
        return (
            "holds the trained weights alone: put them on the model they were trained on with "
            "otter_hf.training.load_trainable, and save that"
        )
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        return "has a config.json but no weights (*.safetensors): copy them there"
    return ""


def _nearest(path: Path) -> str:
    """`; did you mean X?` for the folders that a path may stand for."""
    parent, wanted = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, wanted = parent.parent, parent.name
    try:
        siblings = {entry.name: entry for entry in parent.iterdir() if entry.is_dir() and entry != path}
        close = [siblings[name] for name in difflib.get_close_matches(wanted, siblings, n=2)]
        # the rest of the path below the folder that was meant
        close = [entry / path.relative_to(parent / wanted) for entry in close]
        close += [] if path.is_absolute() else sorted(Path().glob(f"*/{path}"))
    except (OSError, ValueError, NotImplementedError):
        return ""
    found = [repr(str(entry)) for entry in close if any((entry / name).is_file() for name in _CONFIGS)]
    return f"; did you mean {' or '.join(found[:2])}?" if found else ""


def _problem_on_the_hub(path: str, revision: str, config: bool) -> str:
    """Why the Hub has no such model for us; empty if it has, or had when it was downloaded."""
    from huggingface_hub import constants, errors, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import get_hf_file_metadata

    file = "config.json" if config else "tokenizer_config.json"
    if isinstance(try_to_load_from_cache(path, file, revision=revision), str):
        return ""
    near = _nearest(Path(path))
    if constants.HF_HUB_OFFLINE:
        return f"is no folder here and was not downloaded before, and HF_HUB_OFFLINE forbids to ask the Hub{near}"
    if not _answers(constants.ENDPOINT):
        return (
            f"is no folder here and was not downloaded before, and the Hub ({constants.ENDPOINT}) cannot be reached: "
            f"give a folder, or connect this machine{near}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(path, file, revision=revision))
    except errors.EntryNotFoundError:
        return f"is on the Hub but holds no config.json{_how_to_convert(path)}" if config else ""
    except errors.GatedRepoError:
        return f"is gated: ask for access at {constants.ENDPOINT}/{path}, then `hf auth login`"
    except errors.RevisionNotFoundError:
        return f"is on the Hub, but its revision {revision!r} is not"
    except errors.RepositoryNotFoundError:
        return f"is neither a folder here nor on the Hub; if it is private, `hf auth login`{near}"
    except Exception as error:  # whichever client huggingface_hub has
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"answers with status {status}" if status else f"does not answer ({type(error).__name__})"
        return f"is no folder here, and the Hub ({constants.ENDPOINT}) {reason}: try again later{near}"
    return ""


def _how_to_convert(path: str) -> str:
    flamingo = "flamingo" in path.lower()
    return ": make a folder of its checkpoint.pt with `otter-hf convert openflamingo`" if flamingo else ""


def _answers(address: str) -> bool:
    """Whether a connection can be made, through a proxy where one is set; looking up its name counts into the time."""
    url = urlsplit(address)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answered = []

    def connect():
        try:
            socket.create_connection((url.hostname, url.port or {"http": 80}.get(url.scheme, 443)), _SECONDS).close()
            answered.append(True)
        except OSError:
            pass

    # of its own, because a name server that is away holds the caller for longer than any timeout
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return bool(answered)
