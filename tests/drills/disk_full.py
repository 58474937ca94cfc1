"""
Disks that are full after any number of bytes, real ones (tmpfs; root, or `unshare -rm` in front): training, to-parquet
and a conversion end in one sentence, what was complete stays, and with more room the next run finishes with the same
result as one that nothing disturbed.

    python tests/drills/disk_full.py --repeats 10
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: E402
from training_files import command, write_training_files  # noqa: E402

from otter_hf.cli import main as otter_hf  # noqa: E402
from otter_hf.data import to_parquet  # noqa: E402
from otter_hf.data.images import encode_base64, image_bytes  # noqa: E402
from otter_hf.files import is_disk_full  # noqa: E402
from otter_hf.training.checkpoints import find_checkpoint  # noqa: E402
from otter_hf.training.manifest import damage_of  # noqa: E402
from otter_hf.training.run import run as train  # noqa: E402


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files that are not hidden, of a training only of its model."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    if any(path.name == "run.json" for path in paths):
        paths = [folder / "out" / "model.safetensors"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run_training(source: Path, disk: Path) -> None:
    """Three checkpoints and the model."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "resume_from_checkpoint": "auto"}
    recipe = command(source, "recipe", **settings)
    train([*recipe, "--output_dir", str(disk / "out")])


def run_to_parquet(source: Path, disk: Path) -> None:
    """A store of eight parts."""
    code = otter_hf(
        ["data", "to-parquet", str(source / "X.json"), "--output", str(disk / "X.parquet"), "--cache-dir", str(source)]
    )
    if code:
        raise OSError(28, "told by the command")


def run_conversion(source: Path, disk: Path) -> None:
    """A model folder in another dtype."""
    if not (disk / "converted").exists():
        command = [
            "convert",
            "dtype",
            "--source",
            str(source / "base"),
            "--dtype",
            "bfloat16",
            "--output",
            str(disk / "converted"),
        ]
        if otter_hf(command):
            raise OSError(28, "told by the command")


def check_training(disk: Path) -> list[str]:
    checkpoints = list((disk / "out").glob("checkpoint-*"))
    faults = [f"{path.name}: {damage_of(path)}" for path in checkpoints if damage_of(path)]
    if checkpoints and find_checkpoint("auto", disk / "out") is None:
        faults.append("the checkpoints are not gone on from")
    return faults


def check_nothing_half(disk: Path) -> list[str]:
    return [f"{path.name} is there" for path in disk.iterdir() if not path.name.startswith(".")]


WORK: dict[str, tuple[Callable, Callable]] = {
    "training": (run_training, check_training),
    "to-parquet": (run_to_parquet, check_nothing_half),
    "convert": (run_conversion, check_nothing_half),
}


def prepare(folder: Path) -> None:
    """A model, mixtures and a store of pictures."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    to_parquet.PART_BYTES = 200_000
    write_training_files(folder, text_only=7)
    from PIL import Image

    texts = {f"I{i}": encode_base64(image_bytes(Image.effect_noise((60, 60), i + 1))) for i in range(400)}
    (folder / "X.json").write_text(json.dumps(texts))


def mount(disk: Path, size: int, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", disk], check=True)


def drill(folder: Path, kind: str, size: int, expected: dict[str, bytes]) -> dict:
    """One run on a disk of `size` bytes, and another one with room."""
    run, check = WORK[kind]
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    mount(disk, size)
    faults = []
    try:
        try:
            run(folder, disk)
            faults.append("it was not full")
        except Exception as error:
            if not isinstance(error, OSError) or not is_disk_full(error) or "\n" in str(error):
                faults.append(f"{type(error).__name__}: {error}")
        faults += check(disk)
        mount(disk, 1 << 30, "remount")
        run(folder, disk)
        if contents(disk) != expected:
            faults.append("another result")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return {"kind": kind, "bytes": size, "faults": faults}


def run(folder: Path, kind: str, repeats: int) -> list[dict]:
    """Disks that are full after 1/n, 2/n, ... of what an undisturbed run takes."""
    whole = folder / f"whole-{kind}"
    whole.mkdir()
    WORK[kind][0](folder, whole)
    expected = contents(whole)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    results = []
    for number in range(1, repeats + 1):
        results.append(drill(folder, kind, max(1 << 14, int(needed * 0.95 * number / repeats)), expected))
        print(results[-1], flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kind", choices=WORK, nargs="+", default=[*WORK])
    arguments = parser.parse_args()
    all_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind in arguments.kind:
            results = run(Path(folder), kind, arguments.repeats)
            failed = sum(bool(result["faults"]) for result in results)
            all_failed += failed
            print(f"{kind}: {len(results)} tried, {failed} failed", flush=True)
    return int(all_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
