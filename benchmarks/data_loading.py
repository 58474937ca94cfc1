"""
Time and memory from nothing to the first batch, and pictures per second: ours against the 2023 loader's approach.

    python benchmarks/data_loading.py [--folder FOLDER] [--images 68000] [--repeats 3]

Makes a MIMIC-IT dataset of 200,000 records over 68,000 JPEG pictures (3.5 GB; as pandas writes a parquet store, and
as `write_mimicit` does), then measures each loader in a process of its own. Takes six to eight minutes on two cores,
12 GB of disk, and 11 GB of memory for the 2023 loader. Results go to results/data_loading.json, the story is in
data_loading.md.
"""

import argparse
import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


BATCH = 8
SIZE = (224, 224)
SEED = 0
TURN = 20


def picture_id(number: int) -> str:
    return f"BM_IMG_{number:012d}"


def make_jpegs(count: int):
    """`count` different JPEG files of 512 x 384 pixels, about 52 kB each: 200 drawn ones, told apart by a comment."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(200):
        coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
        image = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(image + generator.normal(0, 7, image.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=80)
        drawn.append(buffer.getvalue())
    for number in range(count):
        data = drawn[number % len(drawn)]
        comment = b"\xff\xfe" + (10).to_bytes(2, "big") + number.to_bytes(8, "big")
        yield data[:2] + comment + data[2:]


def make_dataset(folder: Path, num_records: int, num_images: int) -> None:
    """BM.parquet laid out as `DataFrame.to_parquet` does, ours.parquet, and instructions of two sizes."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    from otter_hf.data.parquet_writer import write_images

    folder.mkdir(parents=True, exist_ok=True)
    chunks, ids, total = [], [], 0

    def tee():
        nonlocal total
        encoded = []
        for number, data in enumerate(make_jpegs(num_images)):
            total += len(data)
            ids.append(picture_id(number))
            encoded.append(base64.b64encode(data).decode())
            if len(encoded) == 1000:
                chunks.append(pa.array(encoded))
                encoded.clear()
            yield picture_id(number), data
        chunks.append(pa.array(encoded, pa.string()))

    write_images(folder / "ours.parquet", tee())
    schema = pa.Schema.from_pandas(pd.DataFrame({"base64": [""]}, index=["id"], dtype="object"))
    table = pa.Table.from_arrays([pa.chunked_array(chunks), pa.array(ids)], schema=schema)
    pq.write_table(table, folder / "BM.parquet")  # the defaults, which are also those of pandas
    generator = random.Random(SEED)
    for count in (num_records // 10, num_records):
        data = {
            f"BM_INS_{number:09d}": {
                "instruction": f"What is the {number}th thing that you notice about the object in the picture?",
                "answer": "It is one of several objects of different colours that stand beside each other on a table.",
                "image_ids": [picture_id(generator.randrange(num_images))],
                "rel_ins_ids": [],
            }
            for number in range(count)
        }
        (folder / f"BM_{count}_instructions.json").write_text(json.dumps({"meta": {}, "data": data}))
    (folder / "done.json").write_text(json.dumps({"jpeg_bytes": total}))


def first_batch_2023(folder: Path, instructions: Path) -> None:
    """As the 2023 loader: all records and the whole store in memory, then pictures by label."""
    import pandas as pd
    import pyarrow.parquet as pq
    from PIL import Image

    data = json.loads(instructions.read_text())["data"]
    file = pq.ParquetFile(folder / "BM.parquet")
    images = pd.concat([batch.to_pandas() for batch in file.iter_batches(batch_size=1000)], axis=0)
    ids = list(data)
    for number in random.Random(SEED).sample(range(len(ids)), BATCH):
        record = data[ids[number]]
        text = images["base64"].loc[record["image_ids"][0]]
        Image.open(io.BytesIO(base64.urlsafe_b64decode(text))).convert("RGB").resize(SIZE)


def first_batch_indexed(folder: Path, instructions: Path, store: str) -> None:
    """`MimicitMixture`, shuffled."""
    from otter_hf.data.mixture import MimicitMixture

    mixture = MimicitMixture([entry(instructions, folder / store)], cache_dir=folder / "cache")
    for number in random.Random(SEED).sample(range(len(mixture)), BATCH):
        mixture[number]["media"][0][0].resize(SIZE)


def first_batch_streamed(folder: Path, instructions: Path, store: str) -> None:
    """`StreamedMixture` with its default buffer."""
    from otter_hf.data.stream import StreamedMixture

    stream = iter(StreamedMixture([entry(instructions, folder / store)], cache_dir=folder / "cache"))
    for _ in range(BATCH):
        next(stream)["media"][0][0].resize(SIZE)


def entry(instructions: Path, store: Path):
    from otter_hf.data.mixture import MixtureEntry

    return MixtureEntry("IMAGE_TEXT", "BM", str(instructions), str(store))


def peak_mb() -> float:
    # of this process: ru_maxrss would also count the parent it was forked from
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def child(loader: str, folder: str, instructions: str, *store: str) -> None:
    """Run one loader; prints seconds behind the imports, and peak memory in all and above that of the imports."""
    # what a training process has imported anyway, with either loader: torch, transformers, pandas, pyarrow, Pillow
    import otter_hf.data.mixture
    import otter_hf.data.stream  # noqa: F401

    imported, start = peak_mb(), time.perf_counter()
    globals()[f"first_batch_{loader}"](Path(folder), Path(instructions), *store)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb(), "above_imports_mb": peak_mb() - imported}))


def measure(loader: str, folder: Path, records: int, *store: str, fresh: bool = True) -> dict:
    if fresh:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    arguments = [loader, folder, folder / f"BM_{records}_instructions.json", *store]
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


CASES = {
    "streamed, our store, first open": ("streamed", "ours.parquet", True),
    "streamed, pandas store, first open": ("streamed", "BM.parquet", True),
    "indexed, our store, first open": ("indexed", "ours.parquet", True),
    "indexed, our store, second open": ("indexed", "ours.parquet", False),
}
SCALED = [name for name in CASES if "our store, first open" in name]


def first_batches(folder: Path, records: int, repeats: int) -> list[dict]:
    """Rows of time and memory, loaders taking turns; then what a tenth of the records changes."""
    runs = {name: [] for name in ("2023", *CASES, *(f"{name}, few records" for name in SCALED))}
    for _ in range(repeats):
        runs["2023"].append(measure("2023", folder, records))
        for name, (loader, store, fresh) in CASES.items():
            runs[name].append(measure(loader, folder, records, store, fresh=fresh))
        for name in SCALED:
            loader, store, fresh = CASES[name]
            runs[f"{name}, few records"].append(measure(loader, folder, records // 10, store, fresh=fresh))
    rows = []
    for name in CASES:
        for key, unit in (("seconds", "s"), ("peak_mb", "MB"), ("above_imports_mb", "MB")):
            workload = f"first batch, {records:,} records, {name}: {key}"
            rows.append(first_batch_row(workload, unit, key, runs[name], runs["2023"]))
    for name in SCALED:
        workload = f"first batch, {records // 10:,} records, {name}: seconds"
        few = runs[f"{name}, few records"]
        row = first_batch_row(workload, "s", "seconds", few, runs[name])
        rows.append({**row, "peer_is": f"ours with {records:,} records: 1 is flat"})
    return rows


def first_batch_row(workload: str, unit: str, key: str, ours: list[dict], peer: list[dict]) -> dict:
    from _common import summary

    return {
        "workload": workload,
        "unit": unit,
        "ours": summary([run[key] for run in ours], 3),
        "peer": summary([run[key] for run in peer], 3),
        "ratio": summary([theirs[key] / max(run[key], 1e-3) for run, theirs in zip(ours, peer, strict=True)], 1),
    }


def throughput(folder: Path, num_images: int, repeats: int, pictures: int = 1200) -> list[dict]:
    """Pictures per second out of a store that has just been opened, against the same bytes from memory by Pillow."""
    from _common import summary
    from PIL import Image

    from otter_hf.data.image_store import ImageStore

    generator = random.Random(SEED)
    start = generator.randrange(num_images - pictures)
    cases = [
        ("in order, our store", "ours.parquet", range(start, start + pictures)),
        ("at random, our store", "ours.parquet", generator.sample(range(num_images), pictures)),
        # which is copied to the cache when its pictures are first read, below
        ("at random, pandas store, copied", "BM.parquet", generator.sample(range(num_images), pictures)),
    ]
    rows = []
    for name, file, numbers in cases:
        ids = [picture_id(number) for number in numbers]
        store = ImageStore(folder / file, folder / "cache")
        data = [store.read_bytes(id) for id in ids]
        rates = {"ours": [], "peer": []}
        for _ in range(repeats):
            begin = time.perf_counter()
            store = ImageStore(folder / file, folder / "cache")
            ours, peer = time.perf_counter() - begin, 0.0
            # a few pictures in turn, so that whatever else the machine does meets both
            for first in range(0, pictures, TURN):
                begin = time.perf_counter()
                for id in ids[first : first + TURN]:
                    store[id].resize(SIZE)
                middle = time.perf_counter()
                for one in data[first : first + TURN]:
                    Image.open(io.BytesIO(one)).convert("RGB").resize(SIZE)
                ours, peer = ours + middle - begin, peer + time.perf_counter() - middle
            rates["ours"].append(pictures / ours)
            rates["peer"].append(pictures / peer)
        rows.append(
            {
                "workload": f"{pictures:,} pictures {name}, opening included",
                "unit": "pictures/s",
                "ours": summary(rates["ours"], 1),
                "peer": summary(rates["peer"], 1),
                "ratio": summary([a / b for a, b in zip(*rates.values(), strict=True)], 3),
                "peer_is": "Pillow, from memory",
            }
        )
    return rows


def workers(folder: Path, records: int, repeats: int) -> list[dict]:
    """Samples per second of a data loader with 0, 2 and 4 workers, workers started."""
    from _common import summary
    from torch.utils.data import DataLoader, Subset

    from otter_hf.data.mixture import MimicitMixture

    source = entry(folder / f"BM_{records}_instructions.json", folder / "ours.parquet")
    mixture = MimicitMixture([source], cache_dir=folder / "cache", transform=_small)
    subset = Subset(mixture, random.Random(SEED).sample(range(len(mixture)), 800))
    rates = {}
    for count in (0, 2, 4):
        loader = DataLoader(subset, batch_size=BATCH, num_workers=count, collate_fn=len, persistent_workers=count > 0)
        sum(loader)
        rates[count] = []
        for _ in range(repeats):
            start = time.perf_counter()
            total = sum(loader)
            rates[count].append(total / (time.perf_counter() - start))
    return [
        {
            "workload": f"data loader, {count} workers, {os.cpu_count()} processors",
            "unit": "samples/s",
            "ours": summary(rates[count], 1),
            "peer": summary(rates[0], 1),
            "ratio": summary([a / b for a, b in zip(rates[count], rates[0], strict=True)], 2),
            "peer_is": "no workers",
        }
        for count in (2, 4)
    ]


def _small(sample, generator):
    return {**sample, "media": [[frame.resize(SIZE) for frame in medium] for medium in sample["media"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the dataset, kept there (default: a temporary one)")
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=68_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="data_loading"))
    try:
        if not (folder / "done.json").exists():
            start = time.perf_counter()
            # in a process of its own, whose memory is given back
            command = [sys.executable, __file__, "--child-make", str(folder), str(args.records), str(args.images)]
            subprocess.run(command, check=True)
            print(f"made the dataset in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        jpeg_bytes = json.loads((folder / "done.json").read_text())["jpeg_bytes"]
        rows = first_batches(folder, args.records, args.repeats)
        rows += throughput(folder, args.images, args.repeats)
        rows += workers(folder, args.records, args.repeats)
        for row in rows:
            row["jpeg_gb"] = round(jpeg_bytes / 1e9, 3)

        from _common import report

        report("data_loading", "the 2023 loader's approach: json.load, whole parquet into one pandas frame", rows)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--child-make"]:
        make_dataset(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
