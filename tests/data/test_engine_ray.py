"""Ray: a cluster of two nodes on one machine, and a worker that is killed in the middle."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from engine_steps import write_documents

from otter_hf.data.engine import Engine
from otter_hf.data.pretraining.converters import mmc4_to_tar


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(find_spec, ("datatrove", "ray"))), reason="datatrove and Ray are not installed: the extra ray"
    ),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with one processor each, in a folder of their own, whose name tells their processes."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where it also writes down which cluster is the current one
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        common = ["--num-cpus", "1", "--object-store-memory", "100000000", "--disable-usage-stats"]
        head = ["--head", "--port", address.split(":")[1], "--include-dashboard", "false"]
        try:
            for arguments in (head, ["--address", address]):
                # not in a pipe: what it starts would keep that open
                with open(Path(folder, "start.log"), "w+") as log:
                    command = [ray_command, "start", *arguments, *common]
                    started = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
                    log.seek(0)
                    assert started.returncode == 0, log.read()
            import ray  # which reads the token when it is imported

            ray.init(address, log_to_driver=False)
            assert len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 2
            yield
            ray.shutdown()
        finally:
            # `ray stop` would end every cluster of this user
            for process in psutil.process_iter(["cmdline"]):
                if folder in " ".join(process.info["cmdline"] or ()):
                    process.kill()


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".engine"}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """1,000 documents in 40 files, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("documents")
    patterns = write_documents(folder / "in", files=40, documents=25)
    counts = mmc4_to_tar(*patterns, folder / "one", max_samples=10)
    assert counts.samples == 1000
    return patterns, counts, content(folder / "one")


def test_two_nodes_write_what_one_process_does(tmp_path, cluster, documents):
    patterns, counts, expected = documents
    engine = Engine("ray", tasks=20, workers=2, logging_dir=tmp_path / "logs")
    assert mmc4_to_tar(*patterns, tmp_path / "out", max_samples=10, engine=engine) == counts
    assert content(tmp_path / "out") == expected
    (book,) = (tmp_path / "logs").iterdir()
    assert len(list((book / "completions").iterdir())) == 20


def test_a_worker_killed_in_the_middle(tmp_path, cluster, documents):
    patterns, counts, expected = documents
    command = [sys.executable, "-c", KILL, str(tmp_path / "out"), str(os.getpid())]
    killer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    engine = Engine("ray", tasks=4, workers=2)
    assert mmc4_to_tar(*patterns, tmp_path / "out", max_samples=10, engine=engine) == counts
    assert re.fullmatch(r"killed \d+\n", killer.communicate()[0])
    # all documents are there, none is twice
    assert content(tmp_path / "out") == expected


# beside the test: when some of the shards are there, it kills the worker that is at the next
KILL = """
import os, signal, sys, time, psutil
from pathlib import Path
while True:
    if len(list(Path(sys.argv[1]).glob("*.tar"))) >= 10:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_run_task"):
                os.kill(process.pid, signal.SIGKILL)
                sys.exit(print("killed", process.pid))
    time.sleep(0.001)
"""
