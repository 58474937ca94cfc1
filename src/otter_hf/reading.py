"""Text files that others wrote, read so that whatever is in them ends in one sentence."""

import json
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .storage import AnyPath, to_path


# what a YAML file may stand for, once its aliases are written out
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 200
# of one line in a file of lines: a document with its pictures in base64 has a tenth of that
MAX_LINE_BYTES = 1 << 28
_BRACKETS = re.compile(r"[\[\]{}]")
_LFS = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with its JSONDecodeError also for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("its values are nested too deeply", "", 0) from None


def lines_of(file: BinaryIO, most: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """
    The lines of an open file, which a few bytes of a zip may make as long as they like.

    Of a longer one than `most` bytes nothing is kept: it is given as an empty line.
    """
    while line := file.readline(most):
        if len(line) == most and not line.endswith(b"\n"):
            while (rest := file.readline(most)) and not rest.endswith(b"\n"):
                pass
            line = b"\n"
        yield line


def load_yaml(path: AnyPath, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """
    What a YAML file holds.

    Raises:
        ValueError: naming the file, if it is no YAML, or its aliases stand for more than `MAX_YAML_NODES` values.
        OSError: if there is no such file.
    """
    refuse_lfs_pointer(path)
    try:
        text = to_path(path).read_text(encoding="utf-8")
        # for each bracket PyYAML looks at all that are open
        depths = accumulate((1 if bracket in "[{" else -1) for bracket in _BRACKETS.findall(text))
        if max(depths, default=0) > MAX_YAML_DEPTH:
            raise RecursionError
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            if _size(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"its aliases stand for more than {MAX_YAML_NODES} values")
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except RecursionError:
        raise ValueError(
            f"{path} cannot be parsed, it is not YAML that is read here: its values are nested too deeply."
        ) from None
    except OSError:
        raise
    # YAML's own types raise what their texts lead to: IndexError, AttributeError, OverflowError
    except Exception as error:
        raise ValueError(
            f"{path} cannot be parsed, it is not YAML that is read here: {str(error).rstrip('.')}."
        ) from error


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many nodes a node is, each alias counted as what it stands for."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError("an alias stands for what it is part of")
        return size
    sizes[id(node)] = None
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
    sizes[id(node)] = size = 1 + sum(_size(child, sizes) for child in children)
    return size


def whole_characters(text: str) -> str:
    """
    A text that UTF-8 and tokenizers can hold: half of a surrogate pair, which JSON can spell, becomes a question mark.
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_lfs_pointer(start: bytes) -> bool:
    """Whether the start of a file is that of a pointer of Git LFS, which stands where a file was not downloaded."""
    return start.startswith(_LFS)


def refuse_lfs_pointer(path: AnyPath) -> None:
    """Raise ValueError for a file that is a pointer of Git LFS; what is no file is not looked at."""
    path = to_path(path)
    if path.is_file() and path.stat().st_size <= _POINTER_BYTES:
        with path.open("rb") as file:
            if is_lfs_pointer(file.read(len(_LFS))):
                raise ValueError(f"{path} is a Git LFS pointer, not the file itself: download it with git lfs pull.")


def leads_out(name: str) -> bool:
    """Whether a name that data give to a file leads out of the folder it is to be in; links are not looked at."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def path_inside(folder: str | Path, name: str, *, allow_outside: bool = False) -> Path:
    """
    The path of a file that data name in a folder.

    Raises:
        ValueError: if it leads out of the folder, as `../x`, `/x` and links may, unless `allow_outside`.
    """
    try:
        path = Path(folder, name)
        if allow_outside or path.resolve().is_relative_to(Path(folder).resolve()):
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a name with zeros in it
        raise ValueError(f"{name!r:.80} is no file name ({error})") from None
    raise ValueError(f"{name!r:.80} leads out of {folder}; move the file, or allow such names with --allow-outside")
