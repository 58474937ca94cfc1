"""Requests to the server that are valid, nearly valid, or nonsense; and an ASGI client to send them in-process."""

import asyncio
import base64
import copy
import io
import json
import random

import av
from PIL import Image


def _png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _mp4() -> str:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(3):
            film.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), (number * 80, 0, 0)))))
        film.mux(stream.encode())
    return "data:video/mp4;base64," + base64.b64encode(buffer.getvalue()).decode()


PICTURE = {"type": "image_url", "image_url": {"url": _png()}}
FILM = {"type": "video_url", "video_url": {"url": _mp4()}}
VALID = {
    "messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "what?"}]}],
    "max_tokens": 1,
    "temperature": 0.5,
}
# each is taken alone; what a request may say beside the messages
FIELDS = {
    "max_completion_tokens": [1],
    "top_p": [0, 1, 1e-12],
    "seed": [-1, 2**33 + 1, 2**63 - 1],
    "stop": ["a", ["a", "\n"], []],
    "frequency_penalty": [1, -2.0],
    "presence_penalty": [0, 2],
    "logit_bias": [{}, {"5": 1}, {"5": -100, "6": 100.0}],
    "generation_config": [
        "{}",
        '{"repetition_penalty": 2}',
        '{"num_beams": 2, "length_penalty": 1}',
        '{"num_beams": 2, "early_stopping": true, "no_repeat_ngram_size": 2}',
        '{"top_k": 0, "do_sample": true}',
    ],
    "top_k": [-1, 0, 5],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [1, 1.5],
    "min_tokens": [0, 1, 50],
    "ignore_eos": [True, False, None],
    "prompt_cache_key": ["a"],
    "chat_template_kwargs": [{}, None, {"num_frames": 1}],
    "stream": [True, False, None],
    "stream_options": [None, {"include_usage": True, "continuous_usage_stats": True}],
    "n": [1, 3],
    "logprobs": [True, False],
    "top_logprobs": [0],
    "user": ["me"],
    "metadata": [{"a": "b"}],
    "tools": [[]],
    "response_format": [{"type": "text"}],
    "messages": [
        [{"role": "user", "content": "half a pair \ud83d"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "refusal": None},
            {"role": "user", "content": "b"},
        ],
    ],
}
WORDS = [
    *("", " ", "\0", "\ud800", "\U0001f9a6" * 3, "<image>", "<|endofchunk|>", "<answer>", "</s>", "User:", "a" * 300),
    *("data:", "data:image/png;base64,", "http://", "http://[", "http://[::1]:99999/", "https://a:b/", "file://%00"),
    *(
        "http://\udcff/",
        "data:image/png;base64,\ud800",
        "user",
        "assistant",
        "system",
        "developer",
        "text",
        "image_url",
    ),
    *("video_url", "type", "url", "content", "role", "nan", "1e999", "{{ 1/0 }}", "{% for %}"),
]
NUMBERS = [0, 1, -1, 2, 0.5, 1e-300, 1e300, 2**31, 2**53, 2**64, -(2**64), 10**400, float("nan"), float("inf")]


def valid_bodies():
    """Every value of every field, each in a request of its own: all must be answered."""
    for name, values in FIELDS.items():
        for value in values:
            yield {**copy.deepcopy(VALID), name: value}
    for parts in ([FILM], [PICTURE, PICTURE], [PICTURE, FILM]):
        yield {**_with(parts), "chat_template_kwargs": {"num_frames": 2}}


def _with(parts: list[dict]) -> dict:
    request = copy.deepcopy(VALID)
    request["messages"][0]["content"][:1] = copy.deepcopy(parts)
    return request


def anything(rng: random.Random, depth: int = 0):
    """A value of any type."""
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(WORDS)
    if kind == 4:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(WORDS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    nested = anything(rng, 3)
    for _ in range(rng.choice([5, 50, 400])):
        nested = [nested] if rng.random() < 0.5 else {"type": nested}
    return nested


def body(rng: random.Random) -> dict:
    """A valid request with up to three places changed."""
    request = _with(rng.choices([PICTURE, FILM], [3, 1], k=rng.choice([0, 1, 1, 1, 2])))
    for name in rng.sample(sorted(FIELDS), rng.randrange(3)):
        request[name] = copy.deepcopy(rng.choice(FIELDS[name]))
    for _ in range(rng.randrange(1, 4)):
        _change(request, rng)
    return request


def _change(request, rng: random.Random) -> None:
    place = request
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
            break
        place = place[key]
    change = rng.randrange(6)
    if change == 0:
        del place[key]
    elif change == 1 and isinstance(place, dict):
        place[rng.choice([*WORDS, *FIELDS, "name", "tool_calls", "model", "audio"])] = anything(rng)
    elif change == 2 and isinstance(place, list):
        place.insert(key, copy.deepcopy(rng.choice([place[key], anything(rng)])))
    else:
        place[key] = anything(rng)


def encode(value, rng: random.Random) -> bytes:
    """The request as bytes, now and then not quite JSON."""
    data = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    damage = rng.randrange(20)
    if damage == 0:
        return data[: rng.randrange(len(data))]
    if damage == 1:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if damage == 2:
        return data + rng.choice([b"x", b"{}", b"\0", b" \n"])
    return data


def call(app, content: bytes, path="/v1/chat/completions", method="POST", headers=()) -> tuple[int, bytes]:
    """Status and body of an answer, without a network; a coroutine."""
    return asyncio.run(acall(app, content, path, method, headers))


async def acall(app, content: bytes, path="/v1/chat/completions", method="POST", headers=()) -> tuple[int, bytes]:
    """As `call`, in a running event loop."""
    headers = {"host": "127.0.0.1", "content-type": "application/json", **dict(headers)}
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""},
        **{"method": method, "path": path, "raw_path": path.encode(), "query_string": b""},
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)},
    }
    parts = [{"type": "http.request", "body": content, "more_body": False}]
    ended = asyncio.Event()

    async def receive():
        if parts:
            return parts.pop(0)
        await ended.wait()
        return {"type": "http.disconnect"}

    status, answer = 0, b""

    async def send(message):
        nonlocal status, answer
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer += message.get("body", b"")
            if not message.get("more_body"):
                ended.set()

    await app(scope, receive, send)
    return status, answer
