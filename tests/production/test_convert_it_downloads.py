"""convert-it: the pictures of a story are fetched, with all that a server may do."""

import json
import time
from contextlib import suppress

import pytest
from PIL import Image

from otter_hf.data.image_store import ImageStore
from otter_hf.pictures import encode_image
from otter_hf.production.convert_it import LeftOut, VisualStoryTelling, convert
from otter_hf.production.convert_it.storytelling import download


@pytest.fixture
def flickr(serve, tmp_path):
    """A server with pictures and failures, the number of requests per path, and what may be changed."""
    picture = encode_image(Image.new("RGB", (30, 20), "red"))
    counts, state = {}, {"broken": True}

    def answer(request):
        path = request.path
        counts[path] = counts.get(path, 0) + 1
        if path == "/slow" and state["broken"]:
            time.sleep(1)
        if path == "/moved":
            request.send_response(302)
            request.send_header("Location", "/photo_unavailable.png")
            return request.end_headers()
        if path == "/gone":
            return request.send_error(404)
        if path == "/busy" and counts[path] < 3:
            return request.send_error(503 if counts[path] == 1 else 429)
        if path == "/down" and state["broken"]:
            return request.send_error(500)
        request.send_response(200)
        request.send_header("Content-Length", str(len(picture)))
        request.end_headers()
        with suppress(BrokenPipeError):  # who waited for /slow is gone
            request.wfile.write(picture[:20] if path == "/cut" and state["broken"] else picture)

    with serve(answer) as url:
        yield url, counts, state, picture


def test_downloads(tmp_path, flickr, monkeypatch):
    url, counts, state, picture = flickr
    images = [
        {"id": "1", "url_o": f"{url}/good", "url_m": f"{url}/never"},
        {"id": "2", "url_o": f"{url}/gone", "url_m": f"{url}/good2"},
        {"id": "3", "url_m": f"{url}/busy"},
        {"id": "4", "url_o": f"{url}/gone", "url_m": f"{url}/moved"},
        {"id": "5", "url_o": f"{url}/slow"},
        {"id": "6", "url_o": f"{url}/cut"},
        {"id": "7", "url_o": f"{url}/gone", "url_m": f"{url}/down"},
        {"id": "8"},
        {"id": "9", "url_o": "file:///etc/hostname"},
    ]
    path = tmp_path / "val.story-in-sequence.json"
    path.write_text(json.dumps({"images": images}))
    converter = VisualStoryTelling(path, timeout=0.3, attempts=3, pause=0.01)
    report = convert(converter, tmp_path / "out", size=None, sources_per_shard=2)
    store = ImageStore(report.store)
    assert sorted(store) == ["VST_IMG_1", "VST_IMG_2", "VST_IMG_3"] and store.read_bytes("VST_IMG_3") == picture
    kinds = {entry["source"]: entry["kind"] for entry in report.left_out}
    unreachable = dict.fromkeys(("5", "6", "7", "9"), "unreachable")
    assert kinds == {"4": "expired", "8": "missing", **unreachable}
    reasons = {entry["source"]: entry["reason"] for entry in report.left_out}
    assert f"{url}/gone: HTTP 404; {url}/moved: leads to {url}/photo_unavailable.png" == reasons["4"]
    assert "3 times" in reasons["5"] and "ended after 20 of" in reasons["6"] and "HTTP 500, 3 times" in reasons["7"]
    assert (counts["/good"], counts["/busy"], counts["/down"], counts["/slow"]) == (1, 3, 3, 3)
    assert "/never" not in counts

    state["broken"] = False
    report = convert(converter, tmp_path / "out", size=None, retry=True)
    assert {entry["source"] for entry in report.left_out} == {"4", "8", "9"} and report.images == 6
    # its shard was complete
    assert counts["/good"] == 1


def test_a_download_ends(serve):
    """However little a server sends at a time."""
    sent = []

    def drip(request):
        request.send_response(200)
        request.end_headers()
        with suppress(OSError):
            while len(sent) < 500:
                request.wfile.write(b"x")
                sent.append(b"x")
                time.sleep(0.02)

    with serve(drip) as url:
        with pytest.raises(LeftOut, match="not complete after 0.5 s, 1 times|timed out"):
            download(f"{url}/x", timeout=0.05, attempts=1, pause=0)
        assert len(sent) < 500
