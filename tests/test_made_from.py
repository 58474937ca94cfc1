"""What a result was made from, and what is said when that is no longer there."""

import json
import os

import pytest

from otter_hf.made_from import MadeFrom, keep, kept, state, state_of_all, state_of_model


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    (tmp_path / "pictures" / "sub" / "b.png").write_text("2")
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / "a.json").write_text("22"), "{0}/a.json has changed since"),
        (lambda folder: os.utime(folder / "a.json", ns=(1, 1)), "{0}/a.json has changed since"),
        (lambda folder: (folder / "a.json").unlink(), "{0}/a.json has changed since"),
        (lambda folder: (folder / "pictures" / "sub" / "c.png").touch(), "{0}/pictures has changed since"),
        (lambda folder: (folder / "pictures" / "sub" / "b.png").write_text("22"), "{0}/pictures has changed since"),
    ],
)
def test_what_changed_is_named(files, change, message):
    paths = [files / "a.json", files / "pictures"]
    before = MadeFrom.of(paths, size=None).to_json()
    change(files)
    assert MadeFrom.of(paths, size=None).changes(before) == message.format(files)


def test_other_inputs_and_options_are_named(files):
    before = MadeFrom.of([files / "a.json"], **{"--size": 8, "--name": "x"}).to_json()
    (files / "c.json").write_text("33")
    other = MadeFrom.of([files / "c.json"], **{"--size": 9, "--name": "x"})
    assert other.changes(before) == (
        f"{files}/c.json was not part of it; it was made from {files}/a.json; --size was 8 and is 9"
    )
    os.rename(files / "a.json", files / "pictures" / "a.json")  # the same file elsewhere
    moved = MadeFrom.of([files / "pictures" / "a.json"], **{"--size": 8, "--name": "x"})
    assert moved.changes(before) == ""
    many = MadeFrom(options={str(number): number for number in range(5)})
    assert many.changes(MadeFrom().to_json()).endswith("; and 2 more")
    for nothing in (None, "x", {"files": {}}):
        assert moved.changes(nothing) == "nothing says what it was made from"


def test_records_are_added_to_a_folder(tmp_path):
    assert kept(tmp_path) == {}
    keep(tmp_path, {"x": MadeFrom(options={"a": 1})})
    keep(tmp_path, {"y": MadeFrom()})
    assert kept(tmp_path) == {"x": {"files": {}, "options": {"a": 1}}, "y": {"files": {}, "options": {}}}
    assert [path.name for path in tmp_path.iterdir()] == [".made_from.json"]


def test_the_state_of_a_model_is_that_of_its_weights_and_of_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_text("1")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = state_of_model(adapter)
    (adapter / "results.json").touch()
    assert state_of_model(adapter) == before
    (base / "model.safetensors").write_text("22")
    assert state_of_model(adapter) != before
    assert state_of_model("somebody/no-such-model") is None
    assert state(tmp_path / "gone") is None and state_of_all([]) == state_of_all([])
