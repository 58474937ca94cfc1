"""Files and folders that are replaced whole or not at all, and places in which one process works at a time."""

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from datetime import datetime
from glob import escape
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .storage import AnyPath, is_remote, to_path


# a full disk, a quota, a file that may not grow; and what libraries say whose errors have no number
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "os error 28", "disk is full", "Disk quota exceeded")
# seconds in which what a killed process has left running ends by itself
_UNTIL_CHILDREN_END = 30


@contextlib.contextmanager
def replacing(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """
    A temporary path beside `path`, for a file or a folder, that takes its name when the block ends well.

    What had the name stays as it was until then, and for good if the block fails, whose part is deleted. All of it is
    on the disk before it has the name, so that after a loss of power, too, the name stands for something whole.

    Args:
        path: its folder is made where there is none. For an address (`s3://bucket/x`), the temporary path is that of a
            file of this machine, which is sent there as one object.
        shared: whether other threads or processes, of this machine or another, may be writing the same.

    Raises:
        OSError: if the disk is full, naming `path`; see also `move`.
    """
    path = to_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="otter_hf-") as folder:
            yield Path(folder, path.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.fs.put_file(str(Path(folder, path.name)), path.path)
        return
    own = f".{uuid.uuid4().hex}" if shared else ""
    written = path.with_name(f".{path.name}{own}.incomplete")
    with disk_full_told(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(written)
            yield written
            move(written, path)
        finally:
            remove(written)


def move(written: str | Path, path: str | Path, *, known_folder: bool = False) -> None:
    """
    Gives a complete file or folder its name, after all of it is on the disk; what had the name is deleted.

    Args:
        known_folder: whether a file may take the name of a folder, of which the caller knows what it holds.

    Raises:
        IsADirectoryError: for a file with the name of a folder, which may hold anything and stays.
    """
    written, path = Path(written), Path(path)
    if path.is_dir() and not (written.is_dir() or known_folder):
        raise IsADirectoryError(f"{path} is a folder, and would be replaced by a file: name a file in it, or another.")
    sync(written)
    if path.is_dir() or (path.exists() and written.is_dir()):
        # a folder neither replaces a file nor is replaced by one, and what is deleted by halves shall have no name
        old = path.with_name(f".{path.name}.old")
        remove(old)
        os.replace(path, old)
        os.replace(written, path)
        remove(old)
    else:
        os.replace(written, path)
    _sync_one(path.parent)


def copy_at_address(written: AnyPath, path: AnyPath) -> None:
    """
    Copies a file, or the files of a folder one after the other, to its final name at the same store.

    Copied, not moved: after a kill in between all of them are where they were, and can be copied again.
    """
    written, path = to_path(written), to_path(path)
    files: list[Any] = sorted(written.iterdir()) if written.is_dir() else [written]
    for file in files:
        target: Any = path / file.name if written.is_dir() else path
        target.parent.mkdir(parents=True, exist_ok=True)
        file.fs.cp_file(file.path, target.path)


@contextlib.contextmanager
def fetched(path: AnyPath) -> Iterator[Path]:
    """A file of this machine, for what reads no other: the file itself, or of an address a copy for this block."""
    path = to_path(path)
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="otter_hf-") as folder:
        copy = Path(folder, path.name)
        path.fs.get_file(path.path, str(copy))
        yield copy


def write_text(path: str | Path, text: str) -> None:
    """Replaces a text file, see [`replacing`]; surrogates, which UTF-8 has not, become question marks."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Replaces a JSON file, see [`replacing`]."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def unfinished_folder(output: AnyPath, made_from: Any, kind: str) -> AnyPath:
    """
    The hidden folder beside an output for what a conversion has made so far, `.<output>.<digest>.<kind>`; those of
    other inputs or settings are deleted.

    Args:
        made_from: inputs and settings, with a faithful `repr`.
    """
    output = to_path(output)
    digest = blake2b(repr(made_from).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    folder = output.with_name(f".{output.name}.{digest}.{kind}")
    for other in output.parent.glob(f".{escape(output.name)}.*.{kind}"):
        if other.name != folder.name:
            remove(other)
    return folder


def update_with_file(digest: Any, path: str | Path) -> Any:
    """A hash (of hashlib, or one like it) that has taken in a file, a piece of it at a time."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest


def sync(path: str | Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    path = Path(path)
    if path.is_dir():
        for inner in path.rglob("*"):
            _sync_one(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" or path.is_symlink():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems without such a wait
            raise
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Deletes a file or a folder, if it is there."""
    path = to_path(path)
    if is_remote(path):
        if path.exists():
            path.fs.rm(path.path, recursive=True)
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_told(path: str | Path) -> Iterator[None]:
    """
    Makes one OSError that names `path` of what libraries raise while they write to a full disk.

    Raises:
        OSError: see above; other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        number = error.errno if isinstance(error, OSError) and error.errno in _FULL else errno.ENOSPC
        message = f"{os.strerror(number)} (nothing that was complete has been touched; make room, and run it again)"
        raise OSError(number, message, str(path)) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it, is of a full disk."""
    seen = []  # what led to an error may be the error itself, where a library raises one again
    while error is not None and error not in seen:
        seen.append(error)
        text = str(error)
        if isinstance(error, OSError) and error.errno in _FULL or any(words in text for words in _FULL_WORDS):
            return True
        if "inline_container" in text and ("unexpected pos" in text or "write failed" in text):  # torch.save
            return True
        error = error.__cause__ or error.__context__
    return False


class _Lock(FileLock):
    """A class of its own: lmms-eval makes all `FileLock` of one path the same, which would let a second claim in."""


@contextlib.contextmanager
def claim(lock: str | Path, what: str | Path, *, nested: bool = False) -> Iterator[None]:
    """
    Makes this block the only one at a place, on all that share its file system, until it ends.

    The operating system gives it back when its owner ends, however that comes about.

    Args:
        lock: a file for it, deleted at the end, which names the owner.
        what: the place, as the error calls it.
        nested: whether the thread that has it may claim it again.

    Raises:
        OSError: if another one is there, with its process, its host and the time since when.
    """
    lock = Path(lock)
    is_new = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    taken = _Lock(lock, is_singleton=nested)
    is_first = not taken.is_locked
    try:
        try:
            taken.acquire(timeout=0)
        except Timeout:
            # the data workers of a killed process live on for seconds, and with them what they inherited
            taken.acquire(timeout=_UNTIL_CHILDREN_END if _is_dead(_owner(lock)) else 0, poll_interval=0.1)
    except Timeout:
        raise OSError(
            f"{what} is in use by {_tell(_owner(lock))}: wait until it ends, or choose another output."
        ) from None
    try:
        if is_first:
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            # Windows lets nobody write where the lock is: the owner then stays unnamed
            with contextlib.suppress(PermissionError), disk_full_told(lock):
                lock.write_text(json.dumps(owner) + "\n", encoding="utf-8")
        yield
    finally:
        if is_first:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                lock.unlink()
        taken.release()
        if is_new:
            with contextlib.suppress(OSError):  # it holds something by now
                lock.parent.rmdir()


def _owner(lock: Path) -> dict | None:
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        return owner if isinstance(owner["process"], int) and owner["process"] > 0 else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_dead(owner: dict | None) -> bool:
    if owner is None or owner.get("host") != socket.gethostname() or os.name == "nt":  # where kill has no test
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _tell(owner: dict | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['process']} on {owner.get('host')} since {owner.get('since')}"


__all__ = [
    "claim",
    "copy_at_address",
    "disk_full_told",
    "fetched",
    "is_disk_full",
    "move",
    "remove",
    "replacing",
    "sync",
    "unfinished_folder",
    "update_with_file",
    "write_json",
    "write_text",
]
