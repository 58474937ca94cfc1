"""A server that is killed has answered what it has answered; nothing of it is needed for the rest."""

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving_double import image_url
from training_files import environment


openai = pytest.importorskip("openai", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
httpx = pytest.importorskip("httpx2", reason="what openai's client is made of")

QUESTIONS, TOKENS = 8, 400


@contextlib.contextmanager
def running(folder, tmp_path):
    """A server in a process of its own, and a client for it."""
    command = [sys.executable, "-m", "otter_hf.cli", "serve", folder, "--port", "0", "--device-map", "cpu"]
    with subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "running on" in line)
        url = line.split("running on ")[1].split()[0]
        yield process, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        process.kill()


@pytest.mark.slow
def test_killed_under_load(folders, tmp_path, pictures):
    def ask(client, number: int, heard: list[str]) -> bool:
        """Whether the answer came to its end; what has come of it is in `heard`."""
        content = [image_url(pictures[number % 4]), {"type": "text", "text": "what? " * (number + 1)}]
        try:
            stream = client.chat.completions.create(
                model=folders["otter"],
                messages=[{"role": "user", "content": content}],
                max_tokens=5 if number % 3 == 0 else TOKENS,
                temperature=0,
                stream=True,
            )
            for chunk in stream:
                heard.append(chunk.choices[0].delta.content or "")
                if chunk.choices[0].finish_reason:
                    return True
        except (openai.APIConnectionError, httpx.TransportError):
            pass
        return False

    heard = [[] for _ in range(QUESTIONS)]
    with running(folders["otter"], tmp_path) as (process, client), ThreadPoolExecutor(QUESTIONS) as pool:
        asked = [pool.submit(ask, client, number, heard[number]) for number in range(QUESTIONS)]
        asked[0].result()  # a short one has been answered, others are under way
        process.kill()
        finished = [one.result() for one in asked]
    assert finished[0] and not all(finished)
    with running(folders["otter"], tmp_path) as (process, client):
        for number in range(QUESTIONS):
            whole = []
            assert ask(client, number, whole)
            whole, before = "".join(whole), "".join(heard[number])
            assert before == whole if finished[number] else whole.startswith(before)
