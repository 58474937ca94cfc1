"""WebDataset shards (https://github.com/webdataset/webdataset): plain tar files, read at random and written.

Consecutive members of a tar with the same name up to its first dot are one sample; what follows that dot, in lower
case, tells its parts.
"""

import io
import itertools
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from glob import glob
from pathlib import Path
from typing import BinaryIO, NamedTuple

from transformers.utils import logging

from ...files import remove, replacing, write_json
from ...reading import parse_json, refuse_lfs_pointer
from ...storage import in_this_process, is_one_path, is_remote, to_path


logger = logging.get_logger(__name__)

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_SIZES_FILE = "sizes.json"


class SampleParts(NamedTuple):
    """Where a sample is in its shard: its key, and byte offset and size of each part by suffix."""

    key: str
    parts: dict[str, tuple[int, int]]


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """
    The files that shards are named by.

    Args:
        shards: a tar file; a pattern with braces as in `cc3m/{00000..00331}.tar` or `{00000,00002}.tar`, or with
            wildcards; a folder, for all tar files in it (what img2dataset writes); or a list of these. Addresses as
            `s3://bucket/cc3m/{00000..00331}.tar` likewise.

    Raises:
        ValueError: naming what stands for no file, or for one that does not exist.
    """
    if not is_one_path(shards):
        return [path for one in shards for path in expand_shards(one)]
    if to_path(shards).is_dir():
        paths = sorted(to_path(shards).glob("*.tar"))
    elif any(sign in str(shards) for sign in "*?["):
        paths = [to_path(path) for path in _glob(str(shards))]
    else:
        paths = [to_path(path) for path in expand_braces(str(shards))]
    if not paths:
        raise ValueError(f"Shards {str(shards)!r}: there is no tar file by this name.")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"Shards {str(shards)!r}: {path} does not exist.")
    return paths


def _glob(pattern: str) -> list[str]:
    """Names of files for a pattern with wildcards, in their order."""
    if not is_remote(pattern):
        return sorted(glob(pattern))
    path = to_path(pattern)
    return [path.fs.unstrip_protocol(name) for name in sorted(path.fs.glob(path.path))]


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` -> `a08.tar`, `a09.tar`, `a10.tar`, `a{0,2}.tar` -> `a0.tar`, `a2.tar`; several multiply."""
    return [path for _, path in _expand_braces(pattern)]


def _expand_braces(pattern: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """What stands for the braces, and the whole."""
    pieces = _BRACES.split(pattern)  # text, braces, text, ...
    for chosen in itertools.product(*map(_choices, pieces[1::2])):
        yield chosen, "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces[::2], chosen, fillvalue="")))


def _choices(braces: str) -> list[str]:
    first, dots, last = braces.partition("..")
    if dots and "," not in braces:
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [choice.strip() for choice in braces.split(",")]


def numbered_files(pattern: str) -> dict[tuple[str, ...], str]:
    """
    The files that a pattern stands for, by what stands in place of its `*` or braces, numbers without leading zeros:
    `docs_{0,02}.jsonl` -> `{("0",): "docs_0.jsonl", ("2",): "docs_02.jsonl"}`. With braces they need not exist.
    """
    if "*" in pattern:
        # each star becomes a group; a star does not reach over a folder, as in glob
        normal = (lambda path: "/".join(filter(None, path.split("/")))) if is_remote(pattern) else os.path.normpath
        stars = re.compile("([^/]*)".join(map(re.escape, normal(pattern).split("*"))))
        found = ((stars.fullmatch(normal(path)), path) for path in _glob(pattern))
        files = ((match.groups(), path) for match, path in found if match)
    else:
        files = _expand_braces(pattern)
    return {tuple(part.lstrip("0") or "0" if part.isdigit() else part for part in key): path for key, path in files}


def index_shard(path: Path) -> list[SampleParts]:
    """
    The samples of a shard, in their order, from the headers alone.

    A shard that ends in the middle of a member has the samples before it, and a warning names it.

    Raises:
        ValueError: if the file is no tar, or a compressed one, of which no part can be read by itself.
    """
    samples: list[SampleParts] = []
    error = None
    path = in_this_process(path)
    refuse_lfs_pointer(path)
    try:
        for full_name, offset, size in _plain_members(path) or _members(path):
            name = full_name.rpartition("/")[2]
            stem, dot, suffix = name.partition(".")
            if not dot or not stem:
                continue
            key, suffix = full_name[: -len(suffix) - 1], suffix.lower()
            # a part that is there already starts another sample of the same name
            if not samples or samples[-1].key != key or suffix in samples[-1].parts:
                samples.append(SampleParts(key, {}))
            samples[-1].parts[suffix] = (offset, size)
    except tarfile.ReadError as problem:
        error = problem
    if error is not None:
        if not samples:
            raise ValueError(f"Shard {path} is no plain tar file ({error}): unpack or download it again.")
        end = path.stat().st_size
        if any(offset + size > end for offset, size in samples[-1].parts.values()):
            samples.pop()
        logger.warning(f"Shard {path} is damaged behind sample {len(samples)} ({error}): the rest of it is left out.")
    return samples


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the files in a tar of any dialect."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar_files(tar):
            tar.members = []  # or it keeps them all
            yield member.name, member.offset_data, member.size


def open_unbuffered(path: Path) -> BinaryIO:
    """A file of which parts are read here and there: what is read ahead would be thrown away."""
    # 64 kB are what an answer of an object store costs in time
    return path.open("rb", block_size=1 << 16) if is_remote(path) else open(path, "rb", buffering=0)


def tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """
    The files of a tar whose bytes are there as they are, sparse ones not among them.

    Raises:
        tarfile.ReadError: for damage of any kind, where reading ends.
    """
    last = -1
    try:
        for member in tar:
            # a size below zero leads back to where it was read
            if member.size < 0 or member.offset <= last:
                raise tarfile.ReadError(f"the header at byte {member.offset} leads back")
            last = member.offset
            if member.isreg() and not member.issparse():
                yield member
    except tarfile.ReadError:
        raise
    # what tarfile makes of headers that are none: also UnicodeDecodeError, OverflowError, RecursionError
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError, ValueError) as error:
        raise tarfile.ReadError(f"it has a damaged header: {error}") from error


def _plain_members(path: Path) -> list[tuple[str, int, int]] | None:
    """
    As `_members`, in less time, for a tar with nothing in it but whole files and folders of short names, as WebDataset
    writers make it. None for any other.
    """
    members, offset, end = [], 0, path.stat().st_size
    with open_unbuffered(path) as file:
        while header := file.read(tarfile.BLOCKSIZE):
            if header == _EMPTY_BLOCK:
                return members
            try:
                size, checksum = (int(header[place].rstrip(b" \0"), 8) for place in (_SIZE, _CHECKSUM))
                name = header[:100].rstrip(b"\0").decode("utf-8")
            except ValueError:
                return None
            if len(header) < tarfile.BLOCKSIZE or size < 0 or "\0" in name:
                return None
            kind, offset = header[156:157], offset + tarfile.BLOCKSIZE
            # the prefix of a long name
            if kind not in b"0\0" + b"5" or header[345] or sum(header) - sum(header[_CHECKSUM]) + 256 != checksum:
                return None
            if kind != b"5":
                members.append((name, offset, size))
            offset += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if offset > end:
                return None
            file.seek(offset)
    return members


_EMPTY_BLOCK = bytes(tarfile.BLOCKSIZE)
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)


def shard_sizes(paths: Sequence[Path]) -> list[int]:
    """
    The number of samples of each shard.

    Taken from what stands beside a shard, in this order: `sizes.json` (tar name -> number), img2dataset's
    `NAME_stats.json`, a file `__len__` with the number for all shards of the folder together if the shard is alone;
    otherwise counted, which reads the headers of the whole shard.

    Raises:
        ValueError: for a file of sizes that cannot be understood, and as `index_shard`.
    """
    sizes: list[int] = []
    known: dict[Path, Mapping[str, int]] = {}
    counted = 0
    for path in paths:
        folder = path.parent
        if folder not in known:
            known[folder] = read_sizes(folder)
        size = known[folder].get(path.name)
        if size is None:
            size = _size_by_img2dataset(path)
        if size is None:
            counted += 1
            size = len(index_shard(path))
        sizes.append(size)
    if counted > 100:
        logger.warning(
            f"Counted the samples of {counted} shards; a {_SIZES_FILE} beside them would have told at once."
        )
    return sizes


def read_sizes(folder: Path) -> Mapping[str, int]:
    """The numbers of samples that a folder of shards tells, by name of the shard; `ValueError` if they are none."""
    try:
        file = folder / _SIZES_FILE
        if file.is_file():
            sizes = parse_json(file.read_text(encoding="utf-8"))
            return {name: _whole_number(size) for name, size in sizes.items()}
        file = folder / "__len__"
        if file.is_file():
            shards = [path.name for path in folder.glob("*.tar")]
            total = _whole_number(parse_json(file.read_text(encoding="utf-8")))
            return {shards[0]: total} if len(shards) == 1 else {}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not hold numbers of samples ({error}): mend or delete it.") from None
    return {}


def _size_by_img2dataset(path: Path) -> int | None:
    file = path.with_name(f"{path.stem}_stats.json")
    if not file.is_file():
        return None
    try:
        return _whole_number(parse_json(file.read_text(encoding="utf-8"))["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} has no number of "successes" ({error}): mend or delete it.') from None


def _whole_number(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no number of samples")
    return value


class ShardReader:
    """
    Reads parts of shards wherever they are; keeps some files open, and the indices of the shards used last.

    Args:
        max_indexed: indices are forgotten when they have more samples than this together. To index no shard twice
            while a block is read, at least the size of the block and of its first and last shard.
    """

    MAX_OPEN = 32

    def __init__(self, max_indexed: int):
        self.max_indexed = max_indexed
        self._indexed = 0
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        self._indices: OrderedDict[Path, list[SampleParts]] = OrderedDict()

    def index(self, path: Path) -> list[SampleParts]:
        """See `index_shard`."""
        if path not in self._indices:
            self._indices[path] = index_shard(path)
            self._indexed += len(self._indices[path])
            while self._indexed > self.max_indexed and len(self._indices) > 1:
                self._indexed -= len(self._indices.popitem(last=False)[1])
        self._indices.move_to_end(path)
        return self._indices[path]

    def read(self, path: Path, sample: SampleParts) -> dict[str, bytes]:
        """
        The parts of a sample by suffix.

        Raises:
            OSError: if the file cannot be read, or ends before the sample does.
        """
        file = self._open(path)
        parts = {}
        for suffix, (offset, size) in sample.parts.items():
            file.seek(offset)
            parts[suffix] = file.read(size)
            if len(parts[suffix]) != size:
                raise OSError(f"{path} ends within {sample.key}.{suffix}")
        return parts

    def _open(self, path: Path) -> io.FileIO:
        if path not in self._files:
            self._files[path] = open_unbuffered(in_this_process(path))
            while len(self._files) > self.MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return self._files[path]

    def __reduce__(self):
        return ShardReader, (self.max_indexed,)  # open files stay in the process that opened them


class ShardWriter:
    """
    Writes samples to shards `name(0)`, `name(1)`, ...; each appears when it is complete.

    Args:
        folder: made if it is not there.
        pattern: name of a shard, with one `%d` field such as `%05d.tar`.
        max_samples, max_bytes: a shard that has so many samples, or so many bytes of parts, is closed.

    A context manager: an error leaves only complete shards. `sizes` maps their names to their numbers of samples.
    """

    def __init__(self, folder: str | Path, pattern: str, max_samples: int = 10_000, max_bytes: float = 1e10):
        self.folder = to_path(folder)
        self.pattern = pattern
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        self.sizes: dict[str, int] = {}
        self._tar: tarfile.TarFile | None = None
        self._shard = ExitStack()
        self._count = self._bytes = 0

    def write(self, key: str, parts: Mapping[str, bytes]) -> None:
        """Adds a sample: `parts` are its bytes by suffix without dot. `key` may have no dot behind its last slash."""
        if self._tar is None:
            # another machine may still be writing the same, which was given up because nothing was heard of it
            written = self._shard.enter_context(replacing(self.folder / self._name, shared=True))
            self._tar = self._shard.enter_context(tarfile.open(written, "w", format=tarfile.USTAR_FORMAT))
        for suffix, data in parts.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
            self._bytes += len(data)
        self._count += 1
        if self._count >= self.max_samples or self._bytes >= self.max_bytes:
            self._close_shard()

    @property
    def _name(self) -> str:
        return self.pattern % len(self.sizes)

    def _close_shard(self) -> None:
        self._shard.close()
        self.sizes[self._name] = self._count
        self._tar, self._count, self._bytes = None, 0, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is not None:
            self._shard.__exit__(kind, *error)
        elif self._tar is not None:
            self._close_shard()


def write_sizes(folder: str | Path, sizes: Mapping[str, int]) -> None:
    """Adds numbers of samples (tar name -> number) to `sizes.json` in a folder of shards."""
    folder = to_path(folder)
    _replace_sizes(folder, {**read_sizes(folder), **sizes})


def remove_shards(folder: Path, names: Sequence[str]) -> None:
    """Removes shards with their numbers of samples."""
    if names:
        _replace_sizes(folder, {name: size for name, size in read_sizes(folder).items() if name not in set(names)})
    for name in names:
        remove(folder / name)


def _replace_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    write_json(folder / _SIZES_FILE, dict(sorted(sizes.items())), indent=0)
