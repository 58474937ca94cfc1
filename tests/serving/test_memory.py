"""Twenty large pictures at once take the memory of those being worked on."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from serving_double import image_url
from training_files import environment


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux' /proc")
def test_twenty_large_pictures_at_once(folders, tmp_path):
    openai = pytest.importorskip("openai", reason="the serve extra is not installed")
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    side, slots = 6000, 2
    decoded = side * side * 3  # bytes of one picture
    picture = image_url(Image.new("1", (side, side)))
    message = {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]}
    command = [sys.executable, "-m", "otter_hf.cli", "serve", folders["otter"], "--port", "0"]
    command += ["--slots", str(slots), "--device-map", "cpu"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "running on" in line)
        url = line.split("running on ")[1].split()[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(_) -> str:
            completion = client.chat.completions.create(model=folders["otter"], messages=[message], max_tokens=2)
            return completion.choices[0].finish_reason

        ask(0)
        one = peak_memory(process.pid)
        with ThreadPoolExecutor(20) as pool:
            assert len(list(pool.map(ask, range(20)))) == 20
        twenty = peak_memory(process.pid)
        process.terminate()
        process.wait(30)
    # the other slot with the copies that processing makes; without slots it would be nineteen times as much
    assert (twenty - one) / decoded < 10


def peak_memory(pid: int) -> int:
    """Bytes of the largest resident set of a process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")
