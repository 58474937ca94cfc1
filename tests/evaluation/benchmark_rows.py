"""Tiny data sets in the columns of the benchmarks, a judge on this machine, and a model that says what it is told."""

import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from pathlib import Path

from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage


RED, BLUE = (PILImage.new("RGB", (32, 24), colour) for colour in ("red", "blue"))
OPTIONS = "A. dog, B. cat, C. bird, D. fish"


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """`rows` as parquet; PIL pictures, alone or in lists, become image columns."""
    features = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if not values:
            continue
        if isinstance(values[0], PILImage.Image):
            features[name] = Image()
        elif isinstance(values[0], list) and values[0] and isinstance(values[0][0], PILImage.Image):
            features[name] = List(Image())
    inferred = Dataset.from_list([{k: v for k, v in row.items() if k not in features} for row in rows])
    schema = Features({name: features.get(name) or inferred.features[name] for name in rows[0]})
    Dataset.from_list(rows, features=schema).to_parquet(str(path))
    return path


def magnifierbench(truth: str = "B") -> list[dict]:
    rows = [
        {"id": f"m{i}", "images": [RED], "instruction": f"What is animal {i}? {OPTIONS}", "answer": truth}
        for i in range(3)
    ]
    return [*rows, {"id": "two", "images": [RED, BLUE], "instruction": f"Which? {OPTIONS}", "answer": "A"}]


def mme() -> list[dict]:
    """Two pictures of existence and one of code, each with a question for yes and one for no."""
    names = [("existence", "a"), ("existence", "b"), ("code_reasoning", "c")]
    return [
        {
            "question_id": f"{category}/{name}.png",
            "image": RED,
            "question": f"Is {name} {answer}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category, name in names
        for answer in ("Yes", "No")
    ]


def mme_of_2023() -> list[dict]:
    return [
        {
            "id": f"{row['category'].partition('_')[0]}_{i}",
            "instruction": row["question"],
            "answer": row["answer"],
            "image_ids": [row["question_id"]],
            "images": [row["image"]],
        }
        for i, row in enumerate(mme())
    ]


def pope() -> list[dict]:
    """Four rows of each setting, half yes."""
    return [
        {"question": f"Is there a {i} in the {category} one?", "answer": answer, "image": BLUE, "category": category}
        for category in ("adversarial", "popular", "random")
        for i, answer in enumerate(("yes", "yes", "no", "no"))
    ]


def mmbench(answers: bool = True) -> list[dict]:
    """Question 7 in four turns of its options, question 8 in two."""
    rows = []
    for number, turns in ((7, 4), (8, 2)):
        for turn in range(turns):
            texts = ["dog", "cat", "bird", "fish"][:turns]
            texts = texts[turn:] + texts[:turn]
            rows.append(
                {
                    "index": number + turn * 1_000_000,
                    "image": RED,
                    "question": f"What is {number}?",
                    "hint": "look closely" if number == 7 else None,
                    **{letter: texts[i] if i < turns else None for i, letter in enumerate("ABCD")},
                    "answer": "ABCD"[texts.index("dog")] if answers else None,
                    "category": "animals",
                    "l2-category": "perception",
                    "source": "here",
                    "split": "dev",
                }
            )
    return rows


def scienceqa() -> list[dict]:
    rows = []
    for i, picture in enumerate((RED, BLUE, None, None)):
        row = {"image": picture, "question": f"Why {i}?", "choices": ["so", "because", "never"], "answer": i % 3}
        rows.append({**row, "subject": "natural science" if i else "social science", "grade": f"grade{4 + i}"})
    return rows


def seedbench() -> list[dict]:
    return [
        {
            "question_id": str(i),
            "question": f"Which of {i}?",
            **{
                f"choice_{letter}": text for letter, text in zip("abcd", ("dog", "a cat", "bird", "fish"), strict=True)
            },
            "answer": "ABCD"[i],
            "image": BLUE if i % 2 else RED,
            "question_type_id": 1 + i % 2,
        }
        for i in range(4)
    ]


def mmvet() -> list[dict]:
    return [
        {"id": "v0", "instruction": "How many?", "answer": "2<AND>3", "images": [RED], "capability": ["rec", "math"]},
        {"id": "v1", "instruction": "What is it?", "answer": "dog<OR>cat", "images": [BLUE], "capability": ["rec"]},
    ]


def mathvista() -> list[dict]:
    common = {"unit": "cm", "image": RED, "metadata": "{'task': 'geometry', 'skills': ['algebra', 'arithmetic']}"}
    choice = {"question_type": "multi_choice", "answer_type": "text", "precision": None, "choices": ["long", "short"]}
    number = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None}
    return [
        {"pid": "1", "question": "Long or short?", "answer": "short", **choice, **common},
        {"pid": "2", "question": "How long?", "answer": "1.2", **number, **common},
    ]


@contextmanager
def endpoint(reply):
    """
    An OpenAI-compatible server on this machine.

    Args:
        reply: text of the request's last message -> what to say, or a status to fail with; of two arguments, with the
            whole request -> status and what to say, or the body of a failure.

    Yields the address of its API, and the list of requests it got.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            content = body["messages"][-1]["content"]
            if not isinstance(content, str):
                content = "".join(part.get("text", "") for part in content)
            if len(signature(reply).parameters) == 2:
                status, said = reply(content, body)
            else:
                said = reply(content)
                status, said = (said, {"error": {"message": "no"}}) if isinstance(said, int) else (200, said)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            data = json.dumps(said if status != 200 else {"id": "1", "choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def run_two_processes(config: Path) -> None:
    """`otter-hf eval` by two processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "HF_HOME": str(config.parent / "home"), "CUDA_VISIBLE_DEVICES": ""}
    command += ["-m", "otter_hf.cli", "eval", str(config)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=900)
