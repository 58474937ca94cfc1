import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from otter_hf.production.syphus import SyphusRun


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@contextmanager
def _serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def serve():
    """`serve(answer)`: an HTTP server that hands each request handler to `answer`; a context with its address."""

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        return _serving(Handler)

    return start


@pytest.fixture
def make_run(tmp_path):
    """Makes a run of `count` pairs of pictures in `tmp_path / name`."""
    rows = [{"img_id": str(number), "sentences": [f"It is number {number}"]} for number in range(30)]
    (tmp_path / "sd.json").write_text(json.dumps(rows))

    def make(count=None, name="run", **kwargs):
        dataset = "change.SpotTheDifference"
        return SyphusRun.create(tmp_path / name, dataset, tmp_path / "sd.json", "m", end=count, **kwargs)

    return make
