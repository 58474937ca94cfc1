import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hub_double import HubDouble

from otter_hf.cli import main
from otter_hf.data import hub
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.hub import push_mixture, read_hub_form, write_hub_form
from otter_hf.data.images import image_bytes
from otter_hf.data.parquet_writer import write_rows
from otter_hf.data.validate import check_mixture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


RECORDS = {
    "a": {"instruction": "Colour?", "answer": "red", "image_ids": ["red"], "rel_ins_ids": []},
    "b": {"instruction": "Two?", "answer": "yes", "image_ids": ["blue", "red"], "rel_ins_ids": ["a"]},
    "c": {"instruction": "Hi", "answer": "Hello", "image_ids": [], "rel_ins_ids": []},
}
PLACED = {"p": {"instruction": "Is <image> red?", "answer": "no", "image_ids": ["blue"], "images_in_text": True}}


@pytest.fixture
def mixture(tmp_path, by_colour):
    files = write_mimicit(tmp_path, "X", RECORDS, by_colour, {"b": ["a"]})
    text = write_mimicit(tmp_path, "T", {"t": {"instruction": "Q", "answer": "A"}})
    settings = dict(zip(("mimicit_path", "images_path", "train_config_path"), map(str, files), strict=True))
    placed = write_mimicit(tmp_path, "P", PLACED, by_colour)
    placed_settings = dict(zip(("mimicit_path", "images_path"), map(str, placed), strict=False))
    groups = {
        "IMAGE_TEXT": {"X": settings, "P": placed_settings},
        "TEXT_ONLY": {"T": {"mimicit_path": str(text.instructions_path)}},
    }
    (tmp_path / "mix.yaml").write_text(json.dumps(groups))
    return tmp_path / "mix.yaml"


def same(files, by_colour):
    table, store = load_mimicit(files.instructions_path, files.images_path, files.train_config_path)
    assert table["id"] == ["b"] and table[0]["context"][0]["id"] == "a"
    assert [store.read_bytes(id) for id in table[0]["image_ids"]] == [
        image_bytes(by_colour[n]) for n in ("blue", "red")
    ]


def test_round_trip_through_a_folder(tmp_path, mixture, by_colour):
    folder = tmp_path / "hub"
    assert main(["data", "to-hub", str(mixture), "--output", str(folder)]) == 0
    images = load_dataset(str(folder), "X_Images", split="train", cache_dir=str(tmp_path / "c"))
    assert images["id"] == list(by_colour) and images[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    instructions = load_dataset(str(folder), "X_Instructions", split="train", cache_dir=str(tmp_path / "c"))
    assert instructions[1] == {
        "id": "b",
        "instruction": "Two?",
        "answer": "yes",
        "images": ["blue", "red"],
        "related instructions": ["a"],
    }
    assert main(["data", "from-hub", str(folder), "--name", "X", "--output", str(tmp_path / "back")]) == 0
    same(read_hub_form(str(folder), "X", tmp_path / "back"), by_colour)
    placed = read_hub_form(str(folder), "P", tmp_path / "back")
    assert load_mimicit(*placed)[0]["images_in_text"] == [True]
    text = read_hub_form(str(folder), "T", tmp_path / "back")
    assert text.images_path == () and load_mimicit(text.instructions_path)[0]["id"] == ["t"]
    with pytest.raises(ValueError, match="no configuration Y"):
        read_hub_form(str(folder), "Y", tmp_path / "back")
    with pytest.raises(ValueError, match="exists"):
        write_hub_form(mixture, folder)


def test_rows_without_texts_are_left_out(tmp_path, mixture, caplog):
    """As training leaves them out: with the contexts that name them, and counted."""
    write_hub_form(mixture, tmp_path / "hub")
    for path in (tmp_path / "hub" / "X_Instructions").iterdir():
        rows = pq.read_table(path).to_pylist()
        rows[0]["answer"] = None  # that of a, which is context of b
        pq.write_table(pa.Table.from_pylist(rows), path)
    with caplog.at_level("WARNING", "otter_hf"):
        files = read_hub_form(str(tmp_path / "hub"), "X", tmp_path / "back")
    table, _ = load_mimicit(files.instructions_path, files.images_path, files.train_config_path)
    assert table["id"] == ["b"] and table[0]["rel_ins_ids"] == table[0]["context"] == []
    assert "Left out of X: {'no answer': 1}" in caplog.text
    for path in (tmp_path / "hub" / "X_Train").iterdir():  # nulls, as others write what is empty
        rows = pq.read_table(path).set_column(1, "context", pa.array([None], pa.list_(pa.string())))
        pq.write_table(rows, path)
    files = read_hub_form(str(tmp_path / "hub"), "X", tmp_path / "again")
    assert load_mimicit(files.instructions_path, files.images_path, files.train_config_path)[0]["context"] == [[]]


def test_films_of_frames_keep_their_numbers(tmp_path, by_colour):
    record = {"instruction": "<image>?", "answer": "A", "image_ids": ["red", "blue"], "images_in_text": True}
    files = write_mimicit(tmp_path, "F", {"f": {**record, "frames_per_medium": [2]}}, by_colour)
    settings = {"mimicit_path": str(files.instructions_path), "images_path": str(files.images_path)}
    (tmp_path / "mix.yaml").write_text(json.dumps({"IMAGE_TEXT": {"F": settings}}))
    write_hub_form(tmp_path / "mix.yaml", tmp_path / "hub")
    back = read_hub_form(str(tmp_path / "hub"), "F", tmp_path / "back")
    assert load_mimicit(*back[:2])[0]["frames_per_medium"] == [[2]]
    for wrong, message in (([3], "are 3 images, of which it has 2"), ([2, 0], "list of numbers"), ("2", "a list of")):
        with pytest.raises(ValueError, match=message):
            write_mimicit(tmp_path, "W", {"f": {**record, "frames_per_medium": wrong}}, by_colour)


def test_pictures_in_the_rows(tmp_path, by_colour, monkeypatch):
    """The form of `pufanyi/MIMICIT` whose rows hold their pictures."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {
            "id": Value("string"),
            "instruction": Value("string"),
            "answer": Value("string"),
            "images": List(Image()),
            "related instructions": List(Value("string")),
        }
    )
    rows = [
        {"id": f"CGD_{i}", "instruction": "Q", "answer": "A", "images": pair, "related instructions": ["CGD_none"]}
        for i, pair in enumerate(([by_colour["red"], by_colour["blue"]], [by_colour["blue"], by_colour["red"]]))
    ]
    rows.append({**rows[0], "id": "CGD_none", "answer": None, "images": [by_colour["green"]]})
    (tmp_path / "repo" / "CGD").mkdir(parents=True)
    shard = tmp_path / "repo" / "CGD" / "train.parquet"
    Dataset.from_list(rows, features=features).to_parquet(shard)
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n- config_name: CGD\n  data_files:\n  - split: train\n    path: CGD/*\n---\n"
    )
    read, passes = hub._read_rows, []
    monkeypatch.setattr(hub, "_read_rows", lambda *args, **options: passes.append(args) or read(*args, **options))
    files = read_hub_form(str(tmp_path / "repo"), "CGD", tmp_path / "out")
    assert len(passes) == 1  # they come from afar
    table, store = load_mimicit(files.instructions_path, files.images_path)
    assert len(store) == 2
    colours = [[store[id].getpixel((0, 0)) for id in ids] for ids in table["image_ids"]]
    assert colours == [[(255, 0, 0), (0, 0, 255)], [(0, 0, 255), (255, 0, 0)]]
    # a row that names a file in the place of its picture, of the repository and of whoever reads it
    for place, is_taken in ((tmp_path / "repo" / "red.png", True), (tmp_path / "red.png", False)):
        place.write_bytes(image_bytes(by_colour["red"]))
        write_rows(
            shard,
            features.arrow_schema,
            [{**rows[0], "images": [{"bytes": None, "path": str(place)}], "related instructions": []}],
        )
        if is_taken:
            assert len(load_mimicit(*read_hub_form(str(tmp_path / "repo"), "CGD", tmp_path / "taken")[:2])[1]) == 1
        else:
            with pytest.raises(ValueError, match="Row 'CGD_0' has no picture but the name .*, which is no file in"):
                read_hub_form(str(tmp_path / "repo"), "CGD", tmp_path / "refused")
            assert not (tmp_path / "refused" / "CGD.parquet").exists()
    settings = {"mimicit_path": str(files.instructions_path), "images_path": str(files.images_path)}
    (tmp_path / "mix.yaml").write_text(json.dumps({"IMAGE_TEXT": {"CGD": settings}}))
    assert check_mixture(tmp_path / "mix.yaml").ok()


def test_a_folder_of_another_mixture_is_not_uploaded(tmp_path, mixture, by_colour):
    write_hub_form(mixture, tmp_path / "hub")
    write_mimicit(tmp_path, "P", {"p": {**PLACED["p"], "answer": "yes"}}, by_colour)
    with pytest.raises(ValueError, match="P_instructions.json has changed since; .*remove it, or name another folder"):
        push_mixture(mixture, "tester/mix", tmp_path / "hub")


@pytest.mark.slow
def test_push_and_read_back(tmp_path, mixture, by_colour):
    with HubDouble() as hub_double:
        environment = hub_double.environment(tmp_path / "home")

        def otter(*arguments):
            command = [sys.executable, "-m", "otter_hf.cli", "data", *map(str, arguments)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            return result.stdout

        push = ("to-hub", mixture, "--output", tmp_path / "hub", "--push-to-hub", "tester/mix")
        assert otter(*push).split() == [
            *("X_Images", "X_Instructions", "X_Train", "P_Images", "P_Instructions", "T_Instructions")
        ]
        otter(*push)  # the folder is there: it is only uploaded, which changes nothing
        _, stored = hub_double.repositories["tester/mix"].at("main")
        assert not any(name.startswith(".made_from") for name in stored)
        assert "X_Images/train-00000.parquet" in stored and "README.md" in stored
        otter("from-hub", "tester/mix", "--name", "X", "--output", tmp_path / "back")
    folder = tmp_path / "back"
    table, store = load_mimicit(folder / "X_instructions.json", folder / "X.parquet", folder / "X_train.json")
    assert table["id"] == ["b"] and store.read_bytes("red") == image_bytes(by_colour["red"])
