"""Where files are: here, or in a store that fsspec reaches by an address such as `s3://bucket/folder`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

from .extras import missing


if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from upath import UPath

AnyPath: TypeAlias = Union[str, Path, "UPath"]


def to_path(path: AnyPath) -> "Path | UPath":
    """
    A path of this machine, or of what fsspec reaches.

    Args:
        path: `folder/x`, or an address: `s3://bucket/x`, `hf://datasets/user/name/x`, `memory://x`, ...

    Returns:
        `Path`, or for an address `UPath`, which has the same methods.

    Raises:
        ValueError: for an address of which the package that reads it is not installed.
    """
    if not isinstance(path, str):
        return path
    if not is_remote(path):
        return Path(path)
    try:
        from upath import UPath
    except ImportError:
        raise ValueError(missing(f"the address {path}", "scale")) from None
    try:
        return UPath(path)
    except (ImportError, ValueError) as error:  # s3 without s3fs, protocols that nobody knows
        raise ValueError(f"The address {path} cannot be opened: {error}.") from error


def is_remote(path: AnyPath) -> TypeGuard[Any]:
    """Whether a path is not of this machine's file systems."""
    return "://" in path if isinstance(path, str) else not isinstance(path, Path)


def in_this_process(path: AnyPath) -> AnyPath:
    """The same path, of a file system that was opened here: what holds connections does not live through a fork."""
    return to_path(str(path)) if is_remote(path) else path


def forget_listings(path: AnyPath) -> None:
    """Has a store be asked again for what lies there: fsspec remembers, and other processes have written since."""
    if is_remote(path):
        to_path(path).fs.invalidate_cache()


def is_one_path(paths: object) -> "TypeIs[AnyPath]":
    """Whether this is a path and no list of them."""
    return isinstance(paths, (str, os.PathLike)) or hasattr(paths, "fs")


def full_name(path: AnyPath) -> str:
    """What names a file wherever the process is: its absolute path without links, or its address."""
    return str(path) if is_remote(path) else str(Path(path).resolve())


__all__ = ["AnyPath", "forget_listings", "full_name", "in_this_process", "is_remote", "is_one_path", "to_path"]
