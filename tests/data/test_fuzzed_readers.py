"""Whatever is in a file, its reader returns or raises a clear error."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from otter_hf.data.formats import load_mimicit  # noqa: E402
from otter_hf.data.image_store import ImageStore  # noqa: E402
from otter_hf.data.images import decode_base64, decode_image, encode_base64  # noqa: E402
from otter_hf.data.json_stream import iter_json_object  # noqa: E402
from otter_hf.data.mixture import MixtureEntry  # noqa: E402
from otter_hf.data.parquet_writer import write_images  # noqa: E402
from otter_hf.data.sources import (  # noqa: E402
    read_alpaca,
    read_lima,
    read_llava,
    read_lrv,
    read_m3it,
    read_sharegpt,
    read_svit,
)
from otter_hf.data.validate import check_mixture  # noqa: E402


settings.register_profile(
    "files",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("files")

TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(["instruction", "answer", "image_ids", "rel_ins_ids", "x"])
RECORDS = st.dictionaries(TEXT, JSON | st.dictionaries(KEYS, JSON, max_size=5), max_size=5)


@given(data=st.binary(max_size=200))
def test_base64_survives_every_spelling(data):
    text = encode_base64(data)
    for spelling in (text, text.rstrip("="), base64.urlsafe_b64encode(data).decode(), f"data:x;base64,{text}\n"):
        assert decode_base64(spelling) == data


@given(text=st.text(max_size=50))
def test_any_text_as_base64(text):
    try:
        assert isinstance(decode_base64(text), bytes)
    except ValueError:
        pass


@given(
    data=st.binary(max_size=300),
    head=st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF"]),
)
def test_any_bytes_as_picture(data, head):
    try:
        assert decode_image(head + data).mode == "RGB"
    except OSError as error:
        assert "picture" in str(error)


@given(content=st.dictionaries(TEXT, JSON, max_size=6), indent=st.sampled_from([None, 1]))
def test_streamed_json_is_json(tmp_path, content, indent):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent))
    assert dict(iter_json_object(path)) == content


@given(data=st.binary(max_size=60) | TEXT.map(str.encode))
def test_any_file_as_json(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"data": {' + data)
    for key in (None, "data"):
        try:
            list(iter_json_object(path, key))
        except ValueError as error:
            assert "x.json cannot be read as JSON" in str(error)


@given(records=RECORDS, config=st.none() | st.dictionaries(TEXT, JSON, max_size=3))
def test_any_records(tmp_path, records, config):
    path, cache = tmp_path / "x.json", tmp_path / "cache"
    path.write_text(json.dumps({"data": records}))
    (tmp_path / "train.json").write_text(json.dumps(config or {}))
    arguments = {"train_config_path": tmp_path / "train.json"} if config else {"populate_rel_ins": True}
    try:
        assert len(load_mimicit(path, cache_dir=cache, **arguments)[0]) == len(config or records)
    except ValueError as error:
        assert "x.json" in str(error) or "train.json" in str(error)
    entry = MixtureEntry("IMAGE_TEXT", "X", str(path), (), str(tmp_path / "train.json") if config else "")
    report = check_mixture([entry], cache_dir=cache)
    assert report.table() and json.dumps(report.to_dict())


SOURCE_KEYS = "id image conversations image_id question answer instruction inputs outputs output image_base64_str"


@given(
    rows=st.lists(JSON | st.dictionaries(st.sampled_from(SOURCE_KEYS.split()), JSON, max_size=6), max_size=3),
    lines=st.booleans(),
)
def test_any_source(tmp_path, rows, lines):
    path = tmp_path / "x.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    for read in (read_llava, read_lrv, read_svit, read_m3it, read_alpaca, read_lima, read_sharegpt):
        try:
            list(read(path, tmp_path) if read in (read_llava, read_lrv, read_svit) else read(path))
        except ValueError as error:
            assert "x.json" in str(error)


def parquet_bytes(tmp_path, ours):
    images = {f"I{i}": bytes([i]) * 300 for i in range(40)}
    path = tmp_path / "whole.parquet"
    if ours:
        write_images(path, images.items())
    else:
        table = pa.table({"base64": [encode_base64(one) for one in images.values()], "id": list(images)})
        pq.write_table(table, path, data_page_size=1000)
    return path.read_bytes()


@given(
    ours=st.booleans(),
    place=st.floats(0, 0.999),
    change=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
)
def test_any_damage_to_parquet(tmp_path, ours, place, change, cut):
    data = bytearray(parquet_bytes(tmp_path, ours))
    start = int(place * len(data))
    data[start : start + len(change)] = change
    path = tmp_path / "x.parquet"
    path.write_bytes(data[:start] if cut else data)
    try:
        store = ImageStore(path, tmp_path / "cache")
        ids = list(store)
    except ValueError as error:
        assert "x.parquet" in str(error)
        return
    for id in ids:
        try:
            assert isinstance(store.read_bytes(id), bytes)
        except OSError as error:
            assert "damaged" in str(error)
