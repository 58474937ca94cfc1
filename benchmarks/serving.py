"""The server under load: requests answered together, beside the build before, which answered one at a time.

    OMP_NUM_THREADS=2 python benchmarks/serving.py      # about five minutes on two cores

The model of `decoding.py` (an Otter on a Llama of width 512 and 8 layers, 79 million parameters, random weights,
float32) with a tokenizer of bytes, behind `otter-hf serve` of this build and of the one before it, in processes of
their own. A request has one picture of its own, a text of 10 to 90 letters and asks for 32 tokens, greedily. Measured
are 16 requests sent at once (output tokens per second, 95th percentile of the latencies), one alone, and, of this
build, 64 at once with its memory. Both servers' answers are compared with each other and with those asked alone.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import torch
from _common import check_out, report, summary
from decoding import HEADS, LATENTS, LAYERS, VISION, VOCAB, WIDTH
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterProcessor


BEFORE = "1125d7e"
TOKENS, CLIENTS, MANY = 32, 16, 64


def write_model(folder: str) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{number}" for number in range(VOCAB - len(letters) - 16)]  # room for special tokens
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(letters + words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    image_processor = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    processor = OtterProcessor(image_processor, OtterProcessor.prepare_tokenizer(tokenizer))
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "vocab_size": VOCAB}
    text |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # no answer ends early
    config = OtterConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, **VISION},
        cross_attn_every_n_layers=2,
        cross_attn_gate_init=1.0,
        perceiver_depth=2,
        perceiver_num_latents=LATENTS,
        image_token_id=processor.image_token_id,
        tokenizer_vocab_size=len(processor.tokenizer),
    )
    torch.manual_seed(0)
    model = OtterForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_request(number: int) -> bytes:
    rng = random.Random(number)
    side = rng.randint(40, 120)
    picture = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(side * side * 3)).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(10, 90)))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}
    return json.dumps(body).encode()


class Server:
    """`otter-hf serve` of the package in `source`."""

    def __init__(self, source: Path, folder: str):
        path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "otter_hf.cli", "serve", folder, "--port", "0", "--device-map", "cpu"]
        command += ["--queue", str(MANY)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        line = next(line for line in self.process.stderr if "running on" in line)
        self.address = urlsplit(line.split("running on ")[1].split()[0]).netloc

    def ask(self, request: bytes) -> tuple[str, float]:
        """The answer, and the seconds it took."""
        start = time.perf_counter()
        connection = http.client.HTTPConnection(self.address, timeout=300)
        connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200 or answer["usage"]["completion_tokens"] != TOKENS:
            raise SystemExit(f"The server answered {response.status}: {answer}")
        return answer["choices"][0]["message"]["content"], time.perf_counter() - start

    def ask_at_once(self, requests: list[bytes]) -> tuple[list[str], list[float], float]:
        """The answers, the seconds of each, and of all."""
        with ThreadPoolExecutor(len(requests)) as pool:
            start = time.perf_counter()
            answers, seconds = zip(*pool.map(self.ask, requests), strict=True)
            return list(answers), list(seconds), time.perf_counter() - start

    def peak_memory(self) -> int:
        """Bytes of the largest resident set so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1]


def beside(workload: str, unit: str, ours: list[float], peer: list[float], more_is_better: bool) -> dict:
    ratios = [a / b if more_is_better else b / a for a, b in zip(ours, peer, strict=True)]
    return {
        "workload": workload,
        "unit": unit,
        "ours": summary(ours, 3),
        "peer": summary(peer, 3),
        "ratio": summary(ratios, 2),
    }


def many_at_once(server: Server) -> dict:
    requests = [make_request(1000 + number) for number in range(MANY)]
    before = server.peak_memory()
    answers, seconds, wall = server.ask_at_once(requests)
    grown = server.peak_memory() - before
    alone = [server.ask(request)[0] for request in requests[:CLIENTS]]
    if answers[:CLIENTS] != alone:
        raise SystemExit("Among 64 the answers are not those asked alone.")
    budget = 16_384 * 2 * LAYERS * WIDTH * 4
    if grown > budget:
        raise SystemExit(f"Memory grew by {grown} bytes, above the {budget} of the budget.")
    return {
        "workload": f"{MANY} requests at once, this build",
        "errors": 0,
        "tokens_per_second": round(MANY * TOKENS / wall, 1),
        "p95_seconds": round(p95(seconds), 2),
        "memory_grown_mb": round(grown / 1e6, 1),
        "budget_mb": round(budget / 1e6, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        write_model(model)
        here = Path(__file__).resolve().parent.parent / "src"
        servers = [Server(here, model), Server(check_out(BEFORE, f"{folder}/before"), model)]
        try:
            rows = measure(servers, repeats)
        finally:
            for server in servers:
                server.close()
    report("serving", f"this project at {BEFORE}", rows)


def measure(servers: list[Server], repeats: int) -> list[dict]:
    requests = [make_request(number) for number in range(CLIENTS)]
    expected = [[server.ask(request)[0] for request in requests] for server in servers]  # and a warm-up
    if expected[0] != expected[1]:
        raise SystemExit("The two builds answer differently.")
    alone, rates, latencies = ([], []), ([], []), ([], [])
    for repeat in range(repeats):
        for number, server in enumerate(servers):
            # a picture that was asked about before would not be encoded again
            answers, seconds, wall = server.ask_at_once([make_request(100 * repeat + 200 + i) for i in range(CLIENTS)])
            rates[number].append(CLIENTS * TOKENS / wall)
            latencies[number].append(p95(seconds))
            expected[number] = answers
        if expected[0] != expected[1]:
            raise SystemExit("At once the two builds answer differently.")
        singles = ([], [])
        for i in range(5):
            for number, server in enumerate(servers):
                singles[number].append(server.ask(make_request(10_000 + 10 * repeat + i))[1])
        for number in range(2):
            alone[number].append(statistics.median(singles[number]))
    name = f"{CLIENTS} requests at once, 1 picture and {TOKENS} tokens each"
    return [
        beside(f"{name}: output tokens per second", "tokens/s", *rates, more_is_better=True),
        beside(f"{name}: 95th percentile of latency", "s", *latencies, more_is_better=False),
        beside("one request alone", "s", *alone, more_is_better=False),
        many_at_once(servers[0]),
    ]


if __name__ == "__main__":
    main()
