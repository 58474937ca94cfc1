"""`otter-hf serve` as typed in a terminal."""

import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from training_files import environment

from otter_hf.cli import main, serve


def test_flags_become_limits(monkeypatch, folders, tmp_path):
    uvicorn = pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    monkeypatch.setenv("OTTER_HF_API_KEY", "secret")
    started = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: started.update(options, app=app))
    folder = folders["otter"]
    flags = "--port 0 --max-body-mb 2 --max-image-pixels 100 --max-video-pixels 200 --max-pictures 3 --num-frames 4"
    flags += " --max-new-tokens 5 --request-timeout 6 --slots 7 --queue 8 --shutdown-timeout 9 --no-fetch"
    assert main(["serve", folder, *flags.split(), "--allow-files", str(tmp_path), "--allow-private-addresses"]) == 0
    settings = started["app"].state.chat.settings
    assert (started["port"], started["host"], started["timeout_graceful_shutdown"]) == (0, "127.0.0.1", 9)
    assert (settings.api_key, settings.body_bytes, settings.num_frames) == ("secret", 2 << 20, 4)
    assert (settings.media.image_pixels, settings.media.video_pixels, settings.media.pictures) == (100, 200, 3)
    assert (settings.new_tokens, settings.request_seconds, settings.slots, settings.queue) == (5, 6.0, 7, 8)
    fetch = settings.fetch
    assert (fetch.http, fetch.private_addresses, fetch.file_root, fetch.max_bytes) == (False, True, tmp_path, 2 << 20)


def test_bad_input_is_one_sentence(folders, capsys):
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    assert main(["serve", "./nowhere"]) == 2
    assert "model './nowhere' is neither a folder" in capsys.readouterr().err
    folder = folders["otter"]
    assert main(["serve", folder, "--allow-files", "none"]) == 2
    assert "--allow-files none: there is no such folder." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "./nowhere", "--slots", "0"])
    assert "argument --slots: '0' is no whole number from 1 on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "./nowhere", "--port", "99999"])
    assert "99999 is no port, use one from 0 (any free one) to 65535" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_a_model_is_loaded(folders, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    monkeypatch.setattr(
        "otter_hf.serving.models.ServedModels.__init__", lambda *args, **options: pytest.fail("loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in ("serve", *(["demo"] if find_spec("gradio") else [])):
            assert main([command, folders["otter"], "--port", str(port)]) == 2
            told = capsys.readouterr().err
            assert (
                told == f"otter-hf: Nothing can listen at 127.0.0.1:{port} (Address already in use): give another "
                "--port or --host.\n"
            )


def test_a_name_may_have_an_address_that_is_not_here(monkeypatch):
    """localhost is one of IPv6, too, in containers that have none."""
    absent, here = ((socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1"))
    for found, listens in (([absent, here], True), ([absent], False)):
        resolve = Mock(return_value=found)
        monkeypatch.setattr(serve, "socket", SimpleNamespace(**{**vars(socket), "getaddrinfo": resolve}))
        if listens:
            serve.check_port("localhost", 0)
        else:
            with pytest.raises(ValueError, match="Nothing can listen at localhost:0 .*assign requested address"):
                serve.check_port("localhost", 0)


def test_missing_packages_are_named(folders, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", folders["otter"]]) == 2
    assert re.search("serving needs fastapi, uvicorn and openai: .*pip install 'fastapi>", capsys.readouterr().err)


@pytest.mark.slow
def test_the_process_ends_when_told_to(folders, tmp_path):
    httpx = pytest.importorskip("httpx2", reason="comes with the serve extra")
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    folder = folders["otter"]
    command = [sys.executable, "-m", "otter_hf.cli", "serve", folder, "--port", "0", "--device-map", "cpu"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "running on" in line)
        url = line.split("running on ")[1].split()[0]
        body = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
