import json
import shutil
from collections import Counter

import pytest

from otter_hf.data.formats import write_mimicit
from otter_hf.data.mixture import MimicitMixture, read_mixture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path, by_colour):
    records = {f"r{i}": {"instruction": "Q", "answer": "A", "image_ids": ["red"]} for i in range(6)}
    return write_mimicit(tmp_path, "X", records, by_colour)


def write_yaml(tmp_path, content):
    path = tmp_path / "mix.yaml"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_yaml_is_read_in_group_order(tmp_path, files, caplog):
    path = write_yaml(
        tmp_path,
        f"""
        IMAGE_TEXT_IN_CONTEXT:
          C: {{mimicit_path: X_instructions.json, images_path: [X.parquet], num_samples: 3}}
        VIDEO_TEXT:
        IMAGE_TEXT:
          B: {{mimicit_path: {files.instructions_path}, images_path: X.parquet, weight: 2, train_config_path: }}
          A: {{mimicit_path: X_instructions.json, task_description: Look.}}
        """,
    )
    entries = read_mixture(path)
    assert [(entry.task_group, entry.name) for entry in entries] == [
        ("IMAGE_TEXT", "B"),
        ("IMAGE_TEXT", "A"),
        ("IMAGE_TEXT_IN_CONTEXT", "C"),
    ]
    assert entries[0].images_path == [str(tmp_path / "X.parquet")]
    assert entries[1].task_description == ["Look."]
    assert entries[2].num_samples == 3
    data = MimicitMixture(path)
    assert len(data) == 6 + 6 + 3
    assert Counter(data.task_groups) == {"IMAGE_TEXT": 12, "IMAGE_TEXT_IN_CONTEXT": 3}
    assert data[14]["dataset"] == "C" and data[-15]["dataset"] == "B"
    with pytest.raises(IndexError):
        data[15]
    rows = [line.split() for line in data.summary().splitlines()]
    assert rows[0] == ["group", "dataset", "records", "samples", "share", "images"]
    assert rows[3] == ["IMAGE_TEXT_IN_CONTEXT", "C", "6", "3", "20.0%", "4"]
    assert rows[4] == ["total", "18", "15"]


def test_files_of_one_name_here_and_beside_the_yaml(tmp_path, files, monkeypatch, caplog):
    (tmp_path / "here").mkdir()
    shutil.copy(files.instructions_path, tmp_path / "here")
    path = write_yaml(tmp_path, "TEXT_ONLY: {A: {mimicit_path: X_instructions.json}}")
    monkeypatch.chdir(tmp_path)
    read_mixture(path)
    assert not caplog.records
    monkeypatch.chdir(tmp_path / "here")
    read_mixture(path)
    assert "X_instructions.json is in the working directory, from where it is taken" in caplog.text


def test_yaml_warns_of_unknown_keys_and_empty_groups(tmp_path, files, monkeypatch):
    messages = []
    monkeypatch.setattr("otter_hf.data.mixture_yaml.logger.warning", messages.append)
    read_mixture(
        write_yaml(
            tmp_path,
            {"VIDEO_TEXT": None, "IMAGE_TEXT": {"A": {"mimicit_path": "X.json", "wight": 1}}}
            | {"IMAGE_TEXT": {"A": {"mimicit_path": str(files.instructions_path), "wight": 1}}},
        )
    )
    assert "VIDEO_TEXT has no datasets" in messages[0]
    assert "IMAGE_TEXT/A has unknown keys ['wight']" in messages[1]


GOOD = {"mimicit_path": "X_instructions.json"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("IMAGE_TEXT: [", "mix.yaml cannot be parsed"),
        ("", "must map task groups to datasets, got None"),
        ({"IMAGE_TEXT": None}, "names no datasets"),
        ({"IMAGE_TEXTS": {"A": GOOD}}, "'IMAGE_TEXTS' is no task group, use one of IMAGE_TEXT, TEXT_ONLY"),
        ({"IMAGE_TEXT": [GOOD]}, "the group IMAGE_TEXT must map dataset names"),
        ({"IMAGE_TEXT": {"A": "X.json"}}, "IMAGE_TEXT/A must map keys to values, got 'X.json'"),
        ({"IMAGE_TEXT": {"A": {"num_samples": 3}}}, "IMAGE_TEXT/A: mimicit_path must name the instructions file"),
        ({"IMAGE_TEXT": {"A": {"mimicit_path": "gone.json"}}}, "IMAGE_TEXT/A: the path gone.json does not exist"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "images_path": "gone.parquet"}}}, "the path gone.parquet does not exist"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "images_path": [1]}}}, "images_path must be a string or a list of strings"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "num_samples": "all"}}}, "num_samples must be .* got 'all'"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "num_samples": True}}}, "num_samples must be .* got True"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "num_samples": -2}}}, "num_samples must be .* got -2"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "task_description": {"a": 1}}}}, "task_description must be"),
        ({"IMAGE_TEXT": {"A": {**GOOD, "images_as": "grid"}}}, "images_as must be 'frames' or 'media', got 'grid'"),
        ("IMAGE_TEXT: {A: {num_samples: 1}, A: {num_samples: 2}}", "the key 'A' is there twice"),
    ],
)
def test_wrong_yaml_is_named(tmp_path, files, content, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(write_yaml(tmp_path, content))


def test_missing_yaml_and_wrong_files_are_named(tmp_path, files):
    with pytest.raises(ValueError, match="gone.yaml does not exist"):
        read_mixture(tmp_path / "gone.yaml")
    (tmp_path / "bad.json").write_text("{}")
    path = write_yaml(tmp_path, {"TEXT_ONLY": {"A": {"mimicit_path": "bad.json"}}})
    with pytest.raises(ValueError, match="TEXT_ONLY/A: .*bad.json cannot be read as JSON"):
        MimicitMixture(path)
