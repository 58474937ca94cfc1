"""Model folders whose weights are cut off, pointers or not all there are refused in one sentence, by name."""

import json
import shutil
import struct

import pytest
import torch
from otter_tiny import tiny_model, tiny_processor
from safetensors.torch import load_file, save_file

from otter_hf.conversion.tensors import ConversionError, open_checkpoint
from otter_hf.loading import load_model, read_model


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "whole"
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "damaged")


def change(folder, make):
    tensors = load_file(folder / "model.safetensors")
    make(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder, share):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def escape(folder):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(["a"], "../other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: cut(folder, 0.9), r"model.safetensors is damaged: it has \d+ bytes where its header says \d+"),
        (lambda folder: cut(folder, 0.01), "model.safetensors is damaged: its safetensors header cannot be read"),
        (lambda folder: cut(folder, 0), "model.safetensors is damaged: its safetensors header cannot be read"),
        (
            lambda folder: (folder / "model.safetensors").write_text(POINTER),
            "model.safetensors is a Git LFS pointer, not the file itself: download it with git lfs pull",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git LFS pointer"),
        (escape, "index.json names '../other.safetensors', which is no file beside it"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "index.json is damaged: it names no weight files",
        ),
        (
            lambda folder: change(folder, lambda tensors: tensors.pop("model.perceiver.latents")),
            "damaged lacks model.perceiver.latents, which would be random numbers",
        ),
        (
            lambda folder: change(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:9]]),
            "damaged lacks .*, .*, .* and 6 more, which would be random numbers",
        ),
        (
            lambda folder: change(folder, lambda tensors: tensors.update({"model.perceiver.latents": torch.ones(3)})),
            r"damaged holds model.perceiver.latents as \[3\] for \[.*\], which would be random numbers",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, told):
    damage(folder)
    with pytest.raises(ValueError, match=told) as error:
        read_model(str(folder))
    assert "\n" not in str(error.value)


def test_a_whole_folder_loads(whole):
    expected = load_file(whole / "model.safetensors")
    loaded = load_model(str(whole), device_map="cpu")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())


def write_header(path, entries, size=16):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def entry(start, stop, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "the bytes of b overlap others or leave a gap"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "the bytes of b overlap others or leave a gap"),
        ({"a": entry(-8, 0)}, r"a has shape \[2\] at bytes -8 to 0"),
        ({"a": entry(0, 8, shape=(-2,))}, r"a has shape \[-2\] at bytes 0 to 8"),
        ({"a": entry(0, 8, shape=(3,))}, r"a has 8 bytes, which shape \[3\] in F32 has not"),
        ({"a": entry(0, 8, "X7")}, "a has dtype 'X7', which is none of BOOL, "),
        ({"a": entry(0, 8.0)}, "a has shape"),
        ({"a": 3}, "its header does not say where a is"),
        ({"a": {"dtype": "F32"}}, "its header does not say where a is"),
        ([], "its safetensors header cannot be read"),
    ],
)
def test_a_header_is_checked(tmp_path, entries, told):
    path = tmp_path / "model.safetensors"
    write_header(path, entries)
    with pytest.raises(ConversionError, match=f"model.safetensors is damaged: {told}"):
        open_checkpoint(path)


def test_other_checkpoints_that_are_none(tmp_path):
    content = {"x": torch.ones(2)}
    content["model"] = content
    torch.save(content, tmp_path / "cyclic.pt")
    with pytest.raises(ConversionError, match="cyclic.pt is not a state dict: its 'model' contains itself"):
        open_checkpoint(tmp_path / "cyclic.pt")
    (tmp_path / "pointer.pt").write_text(POINTER)
    with pytest.raises(ConversionError, match="pointer.pt is a Git LFS pointer"):
        open_checkpoint(tmp_path / "pointer.pt")
    torch.save({"x": torch.ones(1000)}, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(ConversionError, match="cut.pt is damaged or is no file of torch.save"):
            open_checkpoint(tmp_path / "cut.pt")
