"""
`kill -9` of an evaluation, and of a server under load, at any moment; started again they end as if nothing had been.

    python tests/drills/killed.py --kind evaluation --repeats 20
    python tests/drills/killed.py --kind server --repeats 20

An evaluation (POPE's questions in batches, and few-shot questions over shared examples, by beams) is killed when any
number of its replies is on disk: the next run writes the same samples to the byte and asks nothing again that was
answered, whole batches apart. A server of eight clients is killed after any number of answers: asked again, each
question gets the answer it gets alone, and none that was answered whole is asked twice; a damaged picture and an
overlong text among them cost themselves alone.

What is killed is a fork of a process that has imported everything but started no threads.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "evaluation")]

import benchmark_rows  # noqa: E402
import yaml  # noqa: E402
from attackers import data_url, image_at, picture, request  # noqa: E402
from benchmark_rows import write_parquet  # noqa: E402
from PIL import Image  # noqa: E402

from otter_hf.cli import main as otter_hf  # noqa: E402
from otter_hf.testing import write_tiny  # noqa: E402


FORK = multiprocessing.get_context("forkserver")
# not all for both: importing lmms-eval makes Pillow fill up pictures that are cut off
PRELOAD = {"evaluation": ["otter_hf.evaluation.run", "lmms_eval.evaluator"], "server": ["otter_hf.serving.app"]}
CLIENTS, QUESTIONS = 8, 48


def silenced(function, *arguments) -> None:
    """What a fork runs, saying nothing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    sys.exit(function(*arguments))


def wait_for(condition, seconds: float = 120) -> bool:
    """Looks every few milliseconds; False if it did not come in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


# --- evaluation ---


def write_evaluation(folder: Path, model: str) -> dict:
    """The configuration without `output`."""

    def rows(count: int, first: int) -> list[dict]:
        colours = ("red", "blue", "green")
        return [
            {"question_id": first + i, "question": f"Colour of {first + i}?", "answers": [colours[i % 3]] * 10}
            | {"image": Image.new("RGB", (30 + i, 24), colours[i % 3])}
            for i in range(count)
        ]

    train = write_parquet(folder / "train.parquet", rows(6, 100))
    test = write_parquet(folder / "test.parquet", rows(12, 0))
    pope = write_parquet(folder / "pope.parquet", benchmark_rows.pope())
    datasets = [
        {"name": "pope", "data_path": str(pope)},
        {"name": "vqav2", "train": str(train), "test": str(test), "shots": [2], "seeds": [1]},
    ]
    model = {"name": "tiny", "path": model, "batch_size": 3, "generation": {"max_new_tokens": 4}}
    return {"models": [model], "datasets": datasets}


def replies(output: Path) -> Counter:
    """How often each question's reply was written."""
    lines = [line for path in output.rglob("replies-*.jsonl") for line in path.read_text().splitlines()]
    keys = []
    for line in lines:
        try:
            keys.append(json.loads(line)["key"])
        except ValueError:  # cut off by the kill
            continue
    return Counter(keys)


def samples(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.samples.jsonl"))}


def evaluate(config: dict, output: Path) -> int:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "output": str(output)}))
    return otter_hf(["eval", str(path)])


def run_evaluation(config: dict, output: Path, kill_at: int | None = None) -> int:
    """Its exit code; killed when so many replies are on disk."""
    process = FORK.Process(target=silenced, args=(evaluate, config, output))
    process.start()
    if kill_at is not None:
        wait_for(lambda: sum(replies(output).values()) >= kill_at or not process.is_alive())
        process.kill()
    process.join()
    return process.exitcode


def drill_evaluation(folder: Path, repeats: int, draw: random.Random) -> list[dict]:
    config = write_evaluation(folder, str(write_tiny("otter", folder / "otter")))
    assert run_evaluation(config, folder / "whole") == 0
    whole, count = samples(folder / "whole"), len(replies(folder / "whole"))
    results = []
    for number in range(repeats):
        output, kill_at, faults = folder / f"run-{number}", draw.randrange(count), []
        if run_evaluation(config, output, kill_at) != -signal.SIGKILL:
            faults.append("it was not killed")
        before = replies(output)
        if run_evaluation(config, output) != 0:
            faults.append("the second run failed")
        after = replies(output)
        if samples(output) != whole:
            faults.append("other samples")
        # a batch cut in two by a window is asked as a whole
        again = sum(after[key] > 1 for key in before)
        if again > config["models"][0]["batch_size"]:
            faults.append(f"{again} answered questions asked again")
        results.append({"killed_at": sum(before.values()), "of": count, "asked_again": again, "faults": faults})
        print(f"{number + 1}: {results[-1]}", flush=True)
    return results


# --- server ---


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_server(model: str, port: int):
    arguments = ["serve", model, "--port", str(port), "--device", "cpu"]
    process = FORK.Process(target=silenced, args=(otter_hf, arguments), daemon=True)
    process.start()
    return process


def ask(port: int, body: bytes) -> tuple[int, str]:
    """Status and answer; raises OSError or HTTPException where none came whole."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = json.loads(response.read())
        return response.status, told["choices"][0]["message"]["content"] if response.status == 200 else ""
    finally:
        connection.close()


def is_up(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False


def questions() -> list[bytes]:
    """Every eighth is poisoned: a picture cut off, or a text beyond the limit."""
    shown = picture()
    bodies = []
    for number in range(QUESTIONS):
        poisoned = number % 8 == 7
        text = "a b" * 1_000_000 if poisoned and number % 16 == 7 else f"what is {number}?"
        data = shown[: len(shown) // 2] if poisoned and number % 16 != 7 else shown
        bodies.append(request(image_at(data_url(data)), text=text))
    return bodies


class Clients:
    """Threads that ask all questions once; one whose answer did not come whole is asked again."""

    def __init__(self, port: int, bodies: list[bytes]):
        self.answered: dict[int, tuple[int, str]] = {}
        self.asked_twice: list[int] = []
        self._port, self._bodies, self._waiting = port, bodies, list(range(len(bodies)))
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_all) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                question = self._waiting.pop(0)
                if question in self.answered:
                    self.asked_twice.append(question)
            try:
                reply = ask(self._port, self._bodies[question])
            except (OSError, http.client.HTTPException, ValueError):
                with self._lock:
                    self._waiting.append(question)
                wait_for(lambda: is_up(self._port))
                continue
            with self._lock:
                self.answered[question] = reply

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def drill_server(folder: Path, repeats: int, draw: random.Random) -> list[dict]:
    model, port, bodies = str(write_tiny("otter", folder / "otter")), free_port(), questions()
    server = start_server(model, port)
    assert wait_for(lambda: is_up(port))
    alone = [ask(port, body) for body in bodies]
    refused = sum(status == 400 for status, _ in alone)
    assert refused == QUESTIONS // 8, Counter(alone)
    results = []
    for number in range(repeats):
        kill_at = draw.randrange(QUESTIONS)
        clients = Clients(port, bodies)
        wait_for(lambda answered=clients.answered, least=kill_at: len(answered) >= least)
        server.kill(), server.join()
        at = len(clients.answered)
        server = start_server(model, port)
        clients.join()
        faults = [f"asked twice: {clients.asked_twice}"] if clients.asked_twice else []
        wrong = [question for question in range(QUESTIONS) if clients.answered.get(question) != alone[question]]
        if wrong:
            faults.append(f"not answered as alone: {wrong}")
        results.append({"killed_at": at, "of": QUESTIONS, "refused": refused, "faults": faults})
        print(f"{number + 1}: {results[-1]}", flush=True)
    server.kill()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("evaluation", "server"), required=True)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    FORK.set_forkserver_preload(["otter_hf.cli", *PRELOAD[arguments.kind]])
    drill = {"evaluation": drill_evaluation, "server": drill_server}[arguments.kind]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_DATASETS_CACHE": folder, "LMMS_EVAL_DATASETS_CACHE": folder}
        results = drill(Path(folder), arguments.repeats, random.Random(0))
    failed = sum(bool(result["faults"]) for result in results)
    print(f"{arguments.kind}: {len(results)} killed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
