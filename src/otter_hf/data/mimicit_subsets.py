"""
The subsets of MIMIC-IT as they were published (https://huggingface.co/papers/2306.05425), and whether a folder holds
them whole.

The MD5 sums are those of the zip files with instructions and train config, from the README of Luodian/Otter, as are
the sizes when unpacked. Numbers of records are those of the copy on the Hub and of others who counted them; None where
nobody published any.
"""

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import md5
from pathlib import Path

from ..files import update_with_file
from .json_stream import iter_json_object


# what browsers, curl, aria2, rclone, huggingface_hub and we call a file that is not all there
_PARTIAL = re.compile(r"\.(part|partial|crdownload|download|aria2|tmp|incomplete|filepart|opdownload)$|^\.~|^~\$")
_SIZE_TOLERANCE = 0.1  # megabytes of 10^6 and of 2^20 bytes differ by 5 %, and the sizes are rounded


@dataclass(frozen=True)
class Subset:
    """
    One subset.

    Args:
        code: in the names of its files.
        title: of its data.
        pictures: where its pictures are from, for `otter-hf data convert-it`.
        md5: of the zip file.
        megabytes: of instructions and train configs, unpacked; None where two sizes were published.
        records: by the stem of the file, `X_instructions.json`.
        images: in its image store.
    """

    code: str
    title: str
    pictures: str
    md5: str
    megabytes: float | None
    records: dict[str, int | None]
    images: int | None = None


SUBSETS = (
    Subset(
        "LA",
        "LLaVA in context",
        "COCO train2017",
        "fdc2427451bcfd8a04bab7a1c2305259",
        338,
        {"LADD": 23_240, "LACONV": 256_870, "LACR_T2T": 76_643, "LACR_I2I": 76_643},
    ),
    Subset(
        "CGD",
        "general differences of COCO pictures",
        "COCO train2017",
        "7fd998c10baaba9c6e39b66761a456a0",
        8.1,
        {"CGD": 141_869},
        118_287,
    ),
    Subset("SD", "spot the difference", "Spot-the-Diff", "5175198daebb997672a21307e8b18a96", 5, {"SD": None}),
    Subset("SN", "scene navigation", "ScanNet frames", "1c4751c5b2c0bcaaeb94dbc5fb39e7a6", 8, {"SN": 6_640}),
    Subset("DC", "dense captions", "ActivityNet videos", "0d373a5f511fd1d9f03ac81bb12e04fe", 171, {"DC": None}),
    Subset("TVC", "TV captions", "TVQA frames", "ea16ec0ef7f35e810e0920e85ed467af", 166, {"TVC": 137_607}),
    Subset(
        "VST", "visual storytelling", "VIST's Flickr albums", "988569e39aaa24da0df547644514b0d4", 32, {"VST": 31_714}
    ),
    Subset("E4D", "first person, first part", "Ego4D videos", "504b779dbc852c943adbe7862d6924d7", None, {"E4D": None}),
)


@dataclass
class SubsetReport:
    """What a folder holds: a line for each file, `errors` of what is damaged, `warnings` of what differs or lacks."""

    files: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_folder(folder: str | Path) -> SubsetReport:
    """
    Compares a folder with what was published: names, sizes, numbers of records, checksums of the zip files; and finds
    files that are not all there, by their name or by their end.

    Pictures are not decoded, nor ids compared: that is `check_mixture`.

    Args:
        folder: with the files of subsets in it, or in folders of it.

    Raises:
        ValueError: if it is no folder, or holds no file of any subset.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    report = SubsetReport()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        if _PARTIAL.search(path.name):
            report.errors.append(f"{path} is a download that was not finished: fetch it again.")
        elif not path.stat().st_size:
            report.errors.append(f"{path} is empty: fetch it again.")
    whole = [path for path in paths if path.stat().st_size and not _PARTIAL.search(path.name)]
    known = sum(_check_zip(path, report) for path in whole if path.suffix == ".zip")
    for subset in SUBSETS:
        known += _check_subset(subset, whole, report)
    if not known and not report.errors:
        names = ", ".join(f"{stem}_instructions.json" for subset in SUBSETS for stem in subset.records)
        raise ValueError(f"{folder} holds no file of MIMIC-IT: its instructions are called {names}.")
    return report


def _check_zip(path: Path, report: SubsetReport) -> bool:
    named = next((subset for subset in SUBSETS if re.match(rf"{subset.code}(?![A-Za-z0-9])", path.name)), None)
    found = update_with_file(md5(usedforsecurity=False), path).hexdigest()
    published = next((subset for subset in SUBSETS if subset.md5 == found), None)
    if published:
        report.files.append(f"{path}: {published.code}, the published checksum")
    elif not zipfile.is_zipfile(path):
        report.errors.append(f"{path} has no end of a zip file: it is cut off, fetch it again.")
    elif named:
        report.warnings.append(f"{path} has the MD5 {found}, {named.md5} was published: another version, or damaged.")
    return bool(published or named)


def _check_subset(subset: Subset, paths: Iterable[Path], report: SubsetReport) -> bool:
    """Whether there is any file of it."""
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    found, size, is_whole = [], 0, True
    for stem, records in subset.records.items():
        for name in (f"{stem}_instructions.json", f"{stem}_train.json"):
            for path in by_name.get(name, ()):
                found.append(path)
                size += path.stat().st_size
                is_whole &= _check_json(path, records if name.endswith("_instructions.json") else None, report)
    stores = [*by_name.get(f"{subset.code}.parquet", ()), *by_name.get(f"{subset.code}.json", ())]
    parts = [path for path in paths if path.parent.name == f"{subset.code}.parquet" and path.suffix == ".parquet"]
    counts = [_check_parquet(path, report) for path in (*stores, *parts) if path.suffix == ".parquet"]
    for path in stores:
        if path.suffix == ".json":
            _check_json(path, subset.images, report)
    if counts and None not in counts and subset.images not in (None, sum(counts)):
        where = stores[0] if stores else parts[0].parent
        report.warnings.append(f"{where} holds {sum(counts):,} pictures, {subset.images:,} were published.")
    if not found and not stores and not parts:
        return False
    for stem in subset.records:
        has = {part: f"{stem}_{part}.json" in by_name for part in ("instructions", "train")}
        if has["train"] and not has["instructions"]:
            report.warnings.append(f"{stem}_instructions.json is not there, though {stem}_train.json is.")
        elif has["instructions"] and not has["train"]:
            report.warnings.append(f"{stem}_train.json is not there: every record will be an example of its own.")
    if not stores and not parts:
        report.warnings.append(
            f"{subset.code} has no image store: `otter-hf data convert-it {subset.code}` makes it of "
            f"{subset.pictures}."
        )
    is_all = all(f"{stem}_{part}.json" in by_name for stem in subset.records for part in ("instructions", "train"))
    if is_all and is_whole and subset.megabytes and abs(size / 1e6 / subset.megabytes - 1) > _SIZE_TOLERANCE:
        report.warnings.append(
            f"{subset.code}: instructions and train config have {size / 1e6:,.1f} MB, {subset.megabytes:g} MB were "
            "published."
        )
    return True


def _check_json(path: Path, published: int | None, report: SubsetReport) -> bool:
    """Whether it can be read to its end."""
    key = "data" if path.name.endswith("_instructions.json") else None
    count = 0
    try:
        for _ in iter_json_object(path, key):
            count += 1
    except ValueError as error:
        report.errors.append(f"{path} cannot be read behind entry {count:,}: cut off or damaged ({error})")
        return False
    told = "" if published is None else f", {published:,} were published"
    report.files.append(f"{path}: {count:,} entries, {path.stat().st_size / 1e6:,.1f} MB{told}")
    if published not in (None, count):
        report.warnings.append(f"{path} holds {count:,} entries, {published:,} were published.")
    return True


def _check_parquet(path: Path, report: SubsetReport) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        count = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        report.errors.append(f"{path} has no end of a parquet file: it is cut off, fetch it again ({error})")
        return None
    report.files.append(f"{path}: {count:,} pictures, {path.stat().st_size / 1e6:,.1f} MB")
    return count
