"""
Honest clients of a server, alone and beside as many that send what is meant to cost: slow bodies, long texts, deep
JSON, pictures that state a huge size, sites that answer slowly, and connections that are left at once. What is shown
is the time an honest answer takes, its 95th percentile, and whether all were answered.

    python tests/drills/attackers.py --clients 8 --seconds 30
"""

import argparse
import base64
import http.client
import io
import itertools
import json
import multiprocessing
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit


sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image  # noqa: E402


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def states_a_huge_size() -> bytes:
    data = bytearray(picture())
    data[16:24] = struct.pack(">2I", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def request(*parts: dict, text: str = "what?") -> bytes:
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 4}).encode()


def image_at(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def post(url: str, body: bytes, timeout: float = 120) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def start_slowly(url: str, seconds: float) -> int:
    """A body of which a byte comes now and then."""
    host = urlsplit(url)
    with socket.create_connection((host.hostname, host.port), 60) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        for _ in range(int(seconds / 0.2)):
            sock.sendall(b" ")
            time.sleep(0.2)
    return 0


def leave_at_once(url: str, body: bytes) -> int:
    host = urlsplit(url)
    with socket.create_connection((host.hostname, host.port), 60) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    time.sleep(0.05)
    return 0


def bodies(slow_site: str) -> dict[str, bytes]:
    """Made once: the machine is the server's, too."""
    return {
        "long text": request(text="a b" * 2_000_000),
        "deep JSON": b'{"a": ' * 100_000,
        "many values": b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}",
        "huge picture": request(*[image_at(data_url(states_a_huge_size()))] * 20),
        "slow site": request(*[image_at(f"{slow_site}/{i}") for i in range(10)]),
    }


def attack(url: str, bodies: dict[str, bytes], until: float, number: int, results: Counter) -> None:
    kinds = {"slow body": lambda: start_slowly(url, 2)}
    kinds |= {kind: partial(post, url, body) for kind, body in bodies.items()}
    kinds["gone"] = lambda: leave_at_once(url, request(image_at(data_url(picture()))))
    for kind in itertools.islice(itertools.cycle(kinds), number, None):
        if time.time() > until:
            return
        try:
            results[kind, kinds[kind]()] += 1
        except OSError:
            results[kind, "no answer"] += 1


def attack_all(url: str, slow_site: str, clients: int, seconds: float, ready) -> None:
    results, made = Counter(), bodies(slow_site)
    ready.wait()
    arguments = url, made, time.time() + seconds
    threads = [threading.Thread(target=attack, args=(*arguments, number, results)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("attacks and what they were answered:", {f"{kind}: {status}": n for (kind, status), n in results.items()})


def ask_all(url: str, clients: int, seconds: float, ready, queue) -> None:
    times: list[float] = []
    failed: Counter = Counter()
    body = request(image_at(data_url(picture())))
    ready.wait()
    until = time.time() + seconds

    def ask() -> None:
        while time.time() < until:
            started = time.perf_counter()
            status = post(url, body)
            if status == 200:
                times.append(time.perf_counter() - started)
            else:
                failed[status] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put((sorted(times), dict(failed)))


def slow_site() -> str:
    """A site of this machine that takes a connection and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    kept: list[socket.socket] = []

    def take() -> None:
        while True:
            kept.append(listener.accept()[0])

    threading.Thread(target=take, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    from serving_double import Server

    from otter_hf.serving.fetch import FetchPolicy
    from otter_hf.testing import write_tiny

    with tempfile.TemporaryDirectory() as folder:
        policy = FetchPolicy(private_addresses=True, timeout=5)
        server = Server([str(write_tiny("otter", folder))], fetch=policy, body_seconds=5)
        context = multiprocessing.get_context("spawn")
        percentiles, failures = [], {}
        site = slow_site()
        for attacked in (False, True):
            post(server.url, request(image_at(data_url(picture()))))
            # the time begins when all have imported what they need
            queue, ready = context.Queue(), context.Barrier(1 + attacked)
            how = arguments.clients, arguments.seconds, ready
            honest = context.Process(target=ask_all, args=(server.url, *how, queue))
            hostile = context.Process(target=attack_all, args=(server.url, site, *how))
            processes = [honest, hostile] if attacked else [honest]
            for process in processes:
                process.start()
            times, failed = queue.get()
            for process in processes:
                process.join()
            percentiles.append(times[int(len(times) * 0.95)])
            failures |= failed
            print(f"{'beside attackers' if attacked else 'alone'}: {len(times)} answers, p95 {percentiles[-1]:.3f} s")
        server.stop()
    ratio = percentiles[1] / percentiles[0]
    print(f"{arguments.clients} attackers beside as many honest clients, {arguments.seconds:g} s: ", end="")
    print(f"ratio of p95 {ratio:.2f}; honest requests refused: {failures or 'none'}")
    return int(ratio > 2 or bool(failures))


if __name__ == "__main__":
    sys.exit(main())
