"""A set like MMC4, and the steps of the tests of the engine, which its workers import."""

import io
import json
import os
import signal
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pretraining_shards import padded, picture


class Remembers(LocalFileSystem):
    """Files of this machine; a folder is listed once, as s3fs does, whatever other processes write into it."""

    protocol = "remembers"

    def ls(self, path, detail=False, **options):
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True)
        return self.dircache[path] if detail else [one["name"] for one in self.dircache[path]]

    def invalidate_cache(self, path=None):
        self.dircache.clear()


# imported under two names in one process of tests
fsspec.register_implementation("remembers", Remembers, clobber=True)
with suppress(ImportError):  # the extra scale
    from upath import UPath
    from upath.registry import register_implementation

    class RemembersPath(UPath):
        """Its paths, which other processes can be handed."""

    register_implementation("remembers", RemembersPath, clobber=True)


def write_documents(folder: Path, files: int, documents: int) -> tuple[str, str]:
    """So many files of so many documents with a picture each; gives the patterns of documents and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = []
        with tarfile.open(folder / f"shard_{number}_images_v2.tar", "w") as tar:
            for document in range(documents):
                name, data = f"{number}_{document}.png", padded(picture(document % 200), 11_000)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                place = {"image_name": name, "matched_text_index": 0, "matched_sim": 0.5}
                text = f"Document {document} of {number}."
                lines.append(json.dumps({"text_list": [text, "B."], "image_info": [place]}))
        (folder / f"docs_{number}.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}/docs_{{0..{files - 1}}}.jsonl", f"{folder}/shard_{{0..{files - 1}}}_images_v2.tar"


class Mark:
    """A step that says in a folder which process it worked in, and kills that once, or has an error."""

    def __init__(self, folder: Path, kill: str = "", fail: str = ""):
        self.folder, self.kill, self.fail = folder, kill, fail

    def __call__(self, item: str, stop) -> dict:
        (self.folder / f"{item}.{os.getpid()}.{time.monotonic_ns()}").touch()
        if item == self.fail:
            raise ValueError(f"item {item} cannot be used")
        if item == self.kill:
            try:
                (self.folder / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return {"length": len(item)}


class TellEnvironment:
    """A step that tells what a variable is in the environment of its process."""

    def __call__(self, item: str, stop) -> dict:
        return {"value": os.environ.get(item)}
