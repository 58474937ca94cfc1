"""docs/planning.md: its tables are what its script computes, and the bytes of a sample are those of shards."""

import importlib.util
import json
from pathlib import Path

import pytest
from data.engine_steps import write_documents

from otter_hf.data.pretraining import expand_shards
from otter_hf.data.pretraining.converters import mmc4_to_tar
from otter_hf.data.pretraining.shards import ShardReader


PAGE = Path(__file__).resolve().parents[2] / "docs" / "planning.md"


def script():
    spec = importlib.util.spec_from_file_location("planning", PAGE.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_tables_are_those_of_the_script():
    page = PAGE.read_text(encoding="utf-8")
    assert script().filled(page) == page


def test_the_tables_of_shards_are_those_of_the_script():
    rows = script().of_shards()
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8") and len(rows) == 4


def test_bytes_of_a_document_in_its_shard(tmp_path):
    """Pictures in base64 are nearly all of what is read, as the page has it."""
    patterns = write_documents(tmp_path / "in", files=2, documents=4)
    mmc4_to_tar(*patterns, tmp_path / "out")
    reader, read, pictures = ShardReader(100), [], 0
    for shard in expand_shards(tmp_path / "out"):
        for sample in reader.index(shard):
            parts = reader.read(shard, sample)
            read.append(sum(map(len, parts.values())))
            pictures += len(json.loads(parts["json"])["image_info"])
    assert len(read) == pictures == 8
    assert sum(read) == pytest.approx(pictures * 11_000 * 4 / 3, rel=0.02)
