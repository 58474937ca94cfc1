import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from otter_hf.data import neighbours
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.neighbours import embed_images, embed_texts, nearest_neighbours, write_neighbours


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_nearest_by_hand():
    # angles of 0, 10, 25, 90 and 180 degrees; lengths do not matter
    angles = torch.deg2rad(torch.tensor([0.0, 10, 25, 90, 180]))
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5], [0.1], [2], [3]])
    expected = [[1, 2, 3], [0, 2, 3], [1, 0, 3], [2, 1, 4], [3, 2, 1]]
    # 90 degrees lie between 0 and 180: of the two, 10 and 180 are 80 and 90 away
    for block in (1, 2, 100):
        assert nearest_neighbours(vectors, 3, block).tolist() == expected
    twins = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    assert nearest_neighbours(twins, 2).tolist() == [[1, 2], [0, 2], [0, 1]]


def test_agrees_with_a_full_sort():
    vectors = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosine = (unit.double() @ unit.double().T).fill_diagonal_(-2)
    assert torch.equal(nearest_neighbours(vectors, 10, 64), cosine.argsort(dim=1, descending=True)[:, :10])


@pytest.mark.parametrize(
    "rows, k, message", [([[1.0], [2.0]], 2, "k must be from 1 to 1"), ([[1.0], [0.0]], 1, "Row 1")]
)
def test_impossible_requests(rows, k, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(torch.tensor(rows), k)


@pytest.fixture
def files(tmp_path, by_colour):
    texts = ["What colour is it?", "aaaa", "What colour is that?", "aaab"]
    records = {
        f"r{i}": {"instruction": text, "answer": "A", "image_ids": [name]}
        for i, (text, name) in enumerate(zip(texts, by_colour, strict=True))
    }
    return write_mimicit(tmp_path, "X", records, by_colour)


def check(files, written, k, context):
    instructions, config = written
    table, _ = load_mimicit(instructions, files.images_path, populate_rel_ins=True)
    assert all(len(set(ids)) == k and id not in ids for id, ids in zip(table["id"], table["rel_ins_ids"], strict=True))
    config = json.loads(config.read_text())
    assert list(config.values()) == [ids[:context] for ids in table["rel_ins_ids"]]
    return table


@pytest.fixture
def encoder(tmp_path, tiny_processor):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tiny_processor.tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_text_neighbours(tmp_path, files, encoder):
    written = write_neighbours(files.instructions_path, tmp_path / "N", encoder, k=2, context=1)
    table = check(files, written, 2, 1)
    # bags of the same bytes are near each other, whatever the random encoder
    assert [ids[0] for ids in table["rel_ins_ids"]] == ["r2", "r3", "r0", "r1"]
    with pytest.raises(ValueError, match="images_path is for by='image'"):
        write_neighbours(files.instructions_path, tmp_path / "N", encoder, images_path=files.images_path, k=1)


def test_an_accelerator_is_used(encoder, clip, monkeypatch):
    """A stand-in for one, which holds no numbers."""
    monkeypatch.setattr("otter_hf.models.offloading.default_device", lambda: torch.device("meta"))
    for embed, item, folder in ((embed_texts, "a", encoder), (embed_images, Image.new("RGB", (16, 16)), clip)):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            embed([item], folder)


def test_a_stopped_call_goes_on(tmp_path, files, encoder, monkeypatch):
    """What is embedded is not embedded again, unless the records or the encoder have changed; also at addresses."""
    monkeypatch.setattr(neighbours, "ITEM_RECORDS", 1)
    embedded, fails = [], {"aaab"}

    def embed(texts, encoder):
        if fails.intersection(texts):
            raise KeyboardInterrupt
        embedded.extend(texts)
        return embed_texts(texts, encoder)

    monkeypatch.setattr(neighbours, "embed_texts", embed)
    with pytest.raises(KeyboardInterrupt):
        write_neighbours(files.instructions_path, tmp_path / "N", encoder, k=2)
    fails.clear()
    assert len(embedded) == 3 and not list(tmp_path.glob("N*"))
    written = write_neighbours(files.instructions_path, tmp_path / "N", encoder, k=2)
    assert len(embedded) == 4 and not list(tmp_path.glob(".N*"))
    check(files, written, 2, 2)
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.makedirs(f"/{tmp_path.name}")
    memory.put_file(str(files.instructions_path), f"/{tmp_path.name}/X.json")
    write_neighbours(f"memory://{tmp_path.name}/X.json", f"memory://{tmp_path.name}/N", encoder, k=2)
    for path in written:
        assert memory.cat_file(f"/{tmp_path.name}/{path.name}") == path.read_bytes()
    assert len(memory.ls(f"/{tmp_path.name}")) == 3


def test_embeddings_are_taken_in_their_order(tmp_path):
    """Of a million records, the numbers of files have one more digit."""
    files = write_mimicit(tmp_path, "X", {f"r{i}": {"instruction": "q", "answer": "a"} for i in range(4)})
    (tmp_path / "E").mkdir()
    for number, angle in ((0, 0.0), (100_352, 1.0), (104_448, 0.1), (1_003_520, 1.1)):
        np.save(tmp_path / "E" / f"{number:06d}.npy", np.array([[np.cos(angle), np.sin(angle)]], np.float32))
    paths = tmp_path / "N_train.json", tmp_path / "N_instructions.json"
    neighbours._settle(tmp_path / "E", files.instructions_path, paths, 1, 1)
    assert json.loads(paths[0].read_text()) == {"r0": ["r2"], "r1": ["r3"], "r2": ["r0"], "r3": ["r1"]}


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 50}, vision_config={**tower, "image_size": 16, "patch_size": 8}
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_image_neighbours(tmp_path, files, clip):
    written = write_neighbours(
        files.instructions_path, tmp_path / "N", clip, by="image", images_path=files.images_path, k=3
    )
    check(files, written, 3, 2)
    with pytest.raises(ValueError, match="Image 'red' is in none of the image stores"):
        write_neighbours(files.instructions_path, tmp_path / "N", clip, by="image", k=3)


def test_records_without_what_is_compared(tmp_path):
    files = write_mimicit(tmp_path, "X", {i: {"instruction": "q", "answer": "a"} for i in "ab"})
    with pytest.raises(ValueError, match="Record 'a' has no image_ids"):
        write_neighbours(files.instructions_path, tmp_path / "N", "none", by="image", k=1)
    with pytest.raises(ValueError, match="by must be"):
        write_neighbours(files.instructions_path, tmp_path / "N", "none", by="sound", k=1)
