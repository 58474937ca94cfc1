"""Small valid files of every kind that is read, what reads them, and mutations of their bytes."""

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from otter_hf import OtterConfig
from otter_hf.conversion.tensors import check_weights, open_checkpoint
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.image_store import ImageStore
from otter_hf.data.images import decode_image, encode_base64
from otter_hf.data.mixture import read_mixture
from otter_hf.data.parquet_writer import write_images
from otter_hf.data.pretraining.converters import laion_to_tar, mmc4_to_tar
from otter_hf.data.pretraining.obelics import obelics_to_tar
from otter_hf.data.pretraining.samples import ImageTextPairs, InterleavedDocuments
from otter_hf.data.pretraining.sets import read_pretraining_sets
from otter_hf.data.pretraining.shards import ShardReader, ShardWriter, index_shard, shard_sizes
from otter_hf.data.sources import read_alpaca, read_llava, read_m3it, read_svit
from otter_hf.films import read_video
from otter_hf.loading import read_config, read_model
from otter_hf.serving.batch import read_questions
from otter_hf.testing import write_tiny


# what a reader may raise
ERRORS = (ValueError, OSError)


def picture(format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, format, **options)
    return buffer.getvalue()


class PlainEncoder:
    """A `TextEncoder` of characters."""

    image_token_id, eos_token = 0xE000, "$"

    def escape(self, text: str) -> str:
        return text

    def encode(self, text: str, max_tokens: int) -> list[int]:
        return [*map(ord, text.replace("<image>", "\ue000"))][:max_tokens]


def _json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _instructions(folder: Path) -> Path:
    records = {f"R{i}": {"instruction": "what?", "answer": "that", "image_ids": ["I0"]} for i in range(4)}
    return write_mimicit(folder, "X", records, {"I0": picture()}, {"R1": ["R0"]}).instructions_path


def _shard(folder: Path) -> Path:
    with ShardWriter(folder, "%d.tar") as writer:
        for number in range(3):
            writer.write(f"a{number}", {"jpg": picture("JPEG"), "txt": b"a caption"})
        info = {"image_base64": encode_base64(picture()), "matched_text_index": 0, "matched_sim": 1.0}
        document = {"text_list": ["A.", "B."], "image_info": [info, {**info, "matched_text_index": 1}]}
        writer.write("d", {"json": json.dumps(document).encode()})
    return folder / "0.tar"


def _read_shard(path: Path) -> None:
    reader = ShardReader(100)
    for sample in index_shard(path):
        try:
            parts = reader.read(path, sample)
            InterleavedDocuments(min_image_bytes=0)("x", parts, PlainEncoder(), random.Random(0))
        except ERRORS:
            pass
        try:
            ImageTextPairs()("x", parts, PlainEncoder(), random.Random(0))
        except (*ERRORS, UnboundLocalError):
            pass


def _sizes(folder: Path) -> Path:
    _shard(folder)
    _json(folder / "sizes.json", {"0.tar": 4})
    return folder / "sizes.json"


def _stats(folder: Path) -> Path:
    _shard(folder)
    _json(folder / "0_stats.json", {"successes": 4})
    return folder / "0_stats.json"


def _mmc4(folder: Path) -> Path:
    infos = [{"image_name": f"{i}.png", "matched_text_index": 0, "matched_sim": 1.0} for i in range(2)]
    lines = [json.dumps({"text_list": ["A."], "image_info": infos, "similarity_matrix": [[1], [1]]})] * 3
    (folder / "docs_0.jsonl").write_text("\n".join(lines))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(picture())
            tar.addfile(info, io.BytesIO(picture()))
    return folder / "docs_0.jsonl"


def _mmc4_tar(folder: Path) -> Path:
    _mmc4(folder)
    return folder / "0.tar"


def _read_mmc4(path: Path) -> None:
    folder, output = path.parent, path.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    mmc4_to_tar(str(folder / "docs_{0..0}.jsonl"), str(folder / "{0..0}.tar"), output)


def _laion(folder: Path) -> Path:
    (folder / "image.tsv").write_text("".join(f"{i}\t{encode_base64(picture())}\n" for i in range(3)))
    (folder / "text.tsv").write_text("".join(f'{i}\t{{"captions": ["a"]}}\n' for i in range(3)))
    return folder / "image.tsv"


def _laion_text(folder: Path) -> Path:
    _laion(folder)
    return folder / "text.tsv"


def _read_laion(path: Path) -> None:
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    laion_to_tar(path.parent, path.parent / "out")


def _obelics(folder: Path) -> Path:
    row = {"images": ["u0", None], "texts": [None, "A."], "metadata": "[]"}
    pq.write_table(pa.Table.from_pylist([row] * 3), folder / "x.parquet")
    with ShardWriter(folder, "%d.tar") as writer:
        writer.write("0", {"jpg": picture("JPEG"), "json": b'{"url": "u0", "status": "success"}'})
    return folder / "x.parquet"


def _read_obelics(path: Path) -> None:
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    obelics_to_tar(path, path.parent / "0.tar", path.parent / "out")


def _read_store(path: Path) -> None:
    store = ImageStore(path, path.parent / "cache")
    for id in list(store)[:8]:
        try:
            store[id]
        except ERRORS:
            pass


def _store(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"x.{suffix}"
        if suffix == "json":
            _json(path, {"I0": encode_base64(picture()), "I1": [encode_base64(picture())]})
        elif suffix == "arrow":
            schema = pa.schema({"id": pa.string(), "image": pa.binary()})
            table = pa.table({"id": ["a", "b"], "image": [picture(), picture()]}, schema)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(table)
        else:
            write_images(path, [(f"I{i}", picture()) for i in range(3)])
        return path

    return make


def _pandas_store(folder: Path) -> Path:
    table = pa.table({"base64": [encode_base64(picture())] * 3, "id": ["a", "b", "c"]})
    pq.write_table(table, folder / "x.parquet", compression="zstd")
    return folder / "x.parquet"


ROW = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>q"}]}
ROW["conversations"].append({"from": "gpt", "value": "a"})


def _rows(folder: Path) -> Path:
    _json(folder / "x.json", [ROW] * 3)
    return folder / "x.json"


def _row_lines(folder: Path) -> Path:
    (folder / "x.jsonl").write_text("\n".join([json.dumps(ROW)] * 3))
    return folder / "x.jsonl"


def _row_table(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([ROW] * 3), folder / "x.parquet")
    return folder / "x.parquet"


def _read_rows(path: Path) -> None:
    for read in (read_llava, read_svit):
        for on_invalid in ("raise", "skip"):
            try:
                list(read(path, path.parent, on_invalid))
            except ERRORS:
                pass
    for read in (read_alpaca, read_m3it):
        try:
            list(read(path, "skip"))
        except ERRORS:
            pass


def _mixture(folder: Path) -> Path:
    _instructions(folder)
    text = (
        "IMAGE_TEXT:\n  X: &x\n    mimicit_path: X_instructions.json\n    images_path: X.parquet\n    num_samples: 2\n"
    )
    (folder / "m.yaml").write_text(text + "VIDEO_TEXT: {Y: *x}\n")
    return folder / "m.yaml"


def _pretraining(folder: Path) -> Path:
    _shard(folder)
    (folder / "p.yaml").write_text("mmc4: {kind: interleaved, shards: 0.tar, num_samples: 4, min_similarity: 0.32}\n")
    return folder / "p.yaml"


def _questions(folder: Path) -> Path:
    (folder / "q.yaml").write_text("- {question: 'what?', image_path: ''}\n- question: 'how?'\n  image_path: []\n")
    return folder / "q.yaml"


def _bytes(suffix: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / f"x.{suffix}").write_bytes(data())
        return folder / f"x.{suffix}"

    return make


def _film(container: str, codec: str) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(6):
            out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (48, 32), (number * 40, 0, 0)))))
        out.mux(stream.encode())
    return buffer.getvalue()


def _gif() -> bytes:
    frames = [Image.new("RGB", (16, 16), (i * 60, 0, 0)) for i in range(4)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


def _read_picture(path: Path) -> None:
    decode_image(path.read_bytes())


def _read_film(path: Path) -> None:
    read_video(path, num_frames=3)


def _weights(folder: Path) -> Path:
    tensors = {"a": torch.ones(3, 4), "b.weight": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def _torch_file(folder: Path) -> Path:
    torch.save({"model": {"a": torch.ones(3, 4), "b.weight": torch.zeros(5)}}, folder / "x.pt")
    return folder / "x.pt"


def _index(folder: Path) -> Path:
    _weights(folder).rename(folder / "model-1.safetensors")
    names = {"a": "model-1.safetensors", "b.weight": "model-1.safetensors"}
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 58}, "weight_map": names})
    return folder / "model.safetensors.index.json"


def _read_weights(path: Path) -> None:
    check_weights(path.parent)
    for tensor in open_checkpoint(path if path.suffix == ".pt" else path.parent).values():
        tensor.load()


def _config(folder: Path) -> Path:
    OtterConfig().save_pretrained(folder)
    return folder / "config.json"


def _model(folder: Path) -> Path:
    return write_tiny("otter", folder / "model") / "config.json"


# name -> (writes a valid file into a folder and names it, reads it)
TARGETS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "instructions": (_instructions, lambda path: load_mimicit(path, cache_dir=path.parent / "cache")),
    "shard": (_shard, _read_shard),
    "sizes": (_sizes, lambda path: shard_sizes([path.parent / "0.tar"])),
    "stats": (_stats, lambda path: shard_sizes([path.parent / "0.tar"])),
    "mmc4": (_mmc4, _read_mmc4),
    "mmc4 tar": (_mmc4_tar, _read_mmc4),
    "laion": (_laion, _read_laion),
    "laion text": (_laion_text, _read_laion),
    "obelics": (_obelics, _read_obelics),
    "json store": (_store("json"), _read_store),
    "arrow store": (_store("arrow"), _read_store),
    "parquet store": (_store("parquet"), _read_store),
    "pandas store": (_pandas_store, _read_store),
    "rows": (_rows, _read_rows),
    "row lines": (_row_lines, _read_rows),
    "row table": (_row_table, _read_rows),
    "mixture": (_mixture, read_mixture),
    "pretraining": (_pretraining, read_pretraining_sets),
    "questions": (_questions, read_questions),
    "weights": (_weights, _read_weights),
    "torch file": (_torch_file, _read_weights),
    "index": (_index, _read_weights),
    "config": (_config, lambda path: read_config(str(path.parent))),
    "model": (_model, lambda path: read_model(str(path.parent), device_map="cpu")),
    "png": (_bytes("png", picture), _read_picture),
    "jpeg": (_bytes("jpg", lambda: picture("JPEG")), _read_picture),
    "webp": (_bytes("webp", lambda: picture("WEBP")), _read_picture),
    "tiff": (_bytes("tiff", lambda: picture("TIFF")), _read_picture),
    "gif": (_bytes("gif", _gif), _read_film),
    "mp4": (_bytes("mp4", lambda: _film("mp4", "mpeg4")), _read_film),
    "mkv": (_bytes("mkv", lambda: _film("matroska", "mpeg4")), _read_film),
    "avi": (_bytes("avi", lambda: _film("avi", "mpeg4")), _read_film),
}
_TOKENS = [b"-1", b"99999999999999999999", b"1e999", b"NaN", b"null", b"{}", b"[]", b'""', b"\\ud800", b"../", b"true"]
_NUMBERS = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes; now and then cut off, or with something behind their end."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(9)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            end = place + len(token := rng.choice(_NUMBERS))
            changed[place:end] = token
        elif kind == 2:
            end = place + rng.randrange(1, 5)
            changed[place:end] = rng.choice(_TOKENS)
        elif kind == 3:
            del changed[place : place + rng.choice([1, 4, 64, 512])]
        elif kind == 4:
            changed[place:place] = changed[place : place + rng.choice([1, 16, 512])]
        elif kind == 5:
            del changed[place:]
        elif kind == 6:
            changed += rng.choice([b"\0", b"}", b"]", b"x", bytes(512), bytes(changed[place:])])
        elif kind == 7 and place < len(changed):
            changed[place] = rng.randrange(256)
        else:
            # a number in a text or a header of a tar
            digits = [at for at, byte in enumerate(changed) if 48 <= byte <= 57]
            if digits:
                changed[rng.choice(digits)] = rng.choice(b"0123456789-.eE ")
    return bytes(changed)
