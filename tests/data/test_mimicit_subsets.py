"""Folders of MIMIC-IT against what was published."""

import dataclasses
import json
import zipfile
from hashlib import md5
from pathlib import Path

import pytest

from otter_hf.cli import main
from otter_hf.data import mimicit_subsets
from otter_hf.data.formats import write_mimicit
from otter_hf.data.mimicit_subsets import SUBSETS, check_folder


RECORDS = {f"SN_{number}": {"instruction": "Where?", "answer": "Here.", "image_ids": ["red"]} for number in range(3)}


@pytest.fixture
def folder(tmp_path, by_colour, monkeypatch):
    """Three records of SN, of which as many are published here, with their zip file."""
    write_mimicit(tmp_path / "SN", "SN", RECORDS, by_colour, {"SN_0": []})
    with zipfile.ZipFile(tmp_path / "SN.zip", "w") as archive:
        archive.write(tmp_path / "SN" / "SN_instructions.json", "SN_instructions.json")
    digest = md5((tmp_path / "SN.zip").read_bytes()).hexdigest()
    size = sum((tmp_path / "SN" / f"SN_{part}.json").stat().st_size for part in ("instructions", "train")) / 1e6
    change = {"md5": digest, "records": {"SN": 3}, "megabytes": size, "images": len(by_colour)}
    subsets = [dataclasses.replace(one, **change) if one.code == "SN" else one for one in SUBSETS]
    monkeypatch.setattr(mimicit_subsets, "SUBSETS", subsets)
    return tmp_path


def test_a_whole_folder(folder, capsys):
    report = check_folder(folder)
    assert not report.errors and not report.warnings and len(report.files) == 4
    (folder / "SN" / "SN.parquet").unlink()
    assert main(["data", "download", "--check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "SN_instructions.json: 3 entries, 0.0 MB, 3 were published" in out and "the published checksum" in out
    assert "warning: SN has no image store: `otter-hf data convert-it SN` makes it of ScanNet frames." in out


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("SN/SN_instructions.json", lambda data: data[: len(data) // 2], "cannot be read behind entry 1: cut off"),
        ("SN/SN_instructions.json", lambda data: b"", "is empty: fetch it again"),
        ("SN/SN.parquet", lambda data: data[:-8], "has no end of a parquet file: it is cut off"),
        ("SN.zip", lambda data: data[:-30], "has no end of a zip file: it is cut off"),
        ("SN/SN_train.json.part", lambda data: b"x", "is a download that was not finished"),
        ("SN/Unconfirmed 1.crdownload", lambda data: b"x", "is a download that was not finished"),
    ],
)
def test_what_is_not_all_there_is_named(folder, name, change, message, capsys):
    path = folder / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    assert main(["data", "download", "--check", str(folder)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert str(path) in line and message in line


def test_what_differs_is_a_warning(folder):
    fewer = json.dumps({"meta": {}, "data": dict(list(RECORDS.items())[:2])})
    (folder / "SN" / "SN_instructions.json").write_text(fewer)
    (folder / "SN" / "SN_train.json").unlink()
    with zipfile.ZipFile(folder / "SN.zip", "a") as archive:
        archive.writestr("more", "")
    report = check_folder(folder)
    assert not report.errors
    texts = "\n".join(report.warnings)
    assert "holds 2 entries, 3 were published" in texts and "SN_train.json is not there" in texts
    assert "another version, or damaged" in texts


def test_folders_without_any(tmp_path):
    with pytest.raises(ValueError, match="holds no file of MIMIC-IT: .* LADD_instructions.json"):
        check_folder(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        check_folder(tmp_path / "gone")


@pytest.mark.parametrize("arguments", [[], ["CGD"], ["CGD", "--check", "x"], ["--output", "x"]])
def test_a_name_or_a_folder_to_check(arguments, capsys):
    assert main(["data", "download", *arguments]) == 2
    assert "download needs the name of a subset and an --output, or --check FOLDER" in capsys.readouterr().err


def test_the_page_has_the_published_figures():
    page = (Path(__file__).resolve().parents[2] / "docs" / "mimicit.md").read_text(encoding="utf-8")
    for subset in SUBSETS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {subset.code} |")]
        assert f"`{subset.md5}`" in row and subset.title in row and subset.pictures in row
        assert all(f"{count:,}" in row for count in subset.records.values() if count)
        assert all(stem in row for stem in subset.records) or len(subset.records) == 1
