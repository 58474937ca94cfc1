"""What a request may cost: each limit is looked at before the cost is paid."""

import asyncio
import inspect
import json
import random
import threading

import pytest
from fuzz.server_requests import PICTURE, VALID, acall, body, call, encode, valid_bodies
from PIL import Image

from otter_hf.films import FilmLimits, open_film
from otter_hf.pictures import encode_base64, encode_image
from otter_hf.serving.fetch import FetchPolicy
from otter_hf.serving.media import MediaLimits, fit_media, image_part, video_part
from otter_hf.serving.messages import Cancelled, MessageReader
from otter_hf.testing import tiny


pytest.importorskip("uvicorn", reason="the serve extra is not installed")


@pytest.fixture(scope="module")
def app_of(folders):
    """An app with a tiny model, by default an Otter, and the given settings, without a network."""
    from otter_hf.serving.app import create_app
    from otter_hf.serving.models import ServedModels
    from otter_hf.serving.settings import ServerSettings

    models = {name: ServedModels([folder], device_map="cpu") for name, folder in folders.items()}
    return lambda family="otter", **settings: create_app(
        models[family], ServerSettings(**{"new_tokens": 2, **settings})
    )


def error_of(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]["message"]


def asking(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


def picture_at(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


FAMILIES = ["otter", "flamingo", "otterhd"]


def test_what_locks_the_server_is_awaited_by_every_fastapi(app_of):
    """FastAPI before 0.124 calls a partial of a coroutine function and never awaits it: the door stood open."""
    locks = [lock.dependency for route in app_of().routes for lock in getattr(route, "dependencies", ())]
    assert len(locks) == 9 and all(inspect.iscoroutinefunction(lock) and inspect.isfunction(lock) for lock in locks)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_valid_value_is_taken(app_of, family):
    app = app_of(family)
    for request in valid_bodies():
        status, answer = call(app, json.dumps(request).encode())
        assert status == 200 and b'"error"' not in answer, (request, answer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_request_is_the_servers_fault(count, family, app_of):
    app = app_of(family, fetch=FetchPolicy(http=False))

    async def send_all():
        for seed in range(count):
            rng = random.Random(seed)
            data = encode(body(rng), rng)
            status, answer = await acall(app, data)
            assert status in (200, 400, 404, 413, 422), (seed, status, answer, data)
            assert b'"code":500' not in answer, (seed, answer, data)

    asyncio.run(send_all())
    assert (app.state.chat.gate.admitted, app.state.chat.gate.running) == (0, 0)


@pytest.mark.parametrize(
    "data", [b'{"a": ' * 70 + b"1" + b"}" * 70, b'{"messages": [' + b"[]," * 60_000 + b"[]]}"], ids=["deep", "many"]
)
def test_what_a_body_would_become_is_bounded(data, app_of):
    status, message = error_of(call(app_of(), data))
    assert status == 400 and "more than 100000 values, or they are nested more than 64 deep" in message


def test_texts_may_hold_what_looks_like_structure(app_of):
    text = '[{,"\\' * 30_000
    request = {**VALID, "messages": asking({"type": "text", "text": text})}
    status, message = error_of(call(app_of(), json.dumps(request).encode()))
    assert status == 400 and "the model reads at most" in message


def test_texts_are_measured_before_they_are_tokenised(app_of):
    request = {**VALID, "messages": asking(*[{"type": "text", "text": "a" * 60}] * 2)}
    app = app_of(media=MediaLimits(text_characters=100))
    status, message = error_of(call(app, json.dumps(request).encode()))
    assert (status, message) == (
        400,
        "messages[0].content[1] makes the texts longer than 100 characters; shorten them.",
    )


def test_only_json_is_read(app_of):
    app, data = app_of(), json.dumps(VALID).encode()
    for kind, status in (("text/plain", 415), ("", 415), ("application/json; charset=utf-8", 200)):
        assert call(app, data, headers={"content-type": kind}.items())[0] == status


def test_hosts():
    from otter_hf.serving.app import is_allowed_host

    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "10.0.0.7:1", "gpu-box", "LOCALHOST"):
        assert is_allowed_host(host, ()), host
    # of Docker, Kubernetes and mDNS, which no page of the web can have
    for host in ("host.docker.internal:8000", "otter.default.svc.cluster.local", "gpu-box.local."):
        assert is_allowed_host(host, ()), host
    for host in (
        "",
        "otter.example.org",
        "127.0.0.1.nip.example",
        "a b",
        "a b.local",
        "local.example.org",
        "[::1",
        "localhost.:x",
    ):
        assert not is_allowed_host(host, ()), host
    assert is_allowed_host("Otter.example.org:443", ("otter.example.org",)) and is_allowed_host("a.b", ("*",))


@pytest.mark.parametrize("path, method", [("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")])
def test_a_page_of_the_web_does_not_reach_this_machine(path, method, app_of):
    headers = {"host": "rebound.example.org"}.items()
    answer = call(app_of(), json.dumps(VALID).encode(), path, method, headers)
    assert error_of(answer) == (
        400,
        "This server does not answer to the Host 'rebound.example.org'; allow it with --allow-host NAME.",
    )
    assert (
        call(app_of(allow_hosts=("rebound.example.org",)), json.dumps(VALID).encode(), path, method, headers)[0] == 200
    )


def test_films_beside_pictures_are_bounded():
    """Which a processor of Flamingo's pads to the longest of them."""
    picture, processor = Image.new("RGB", (4, 4)), tiny("otter")[1]

    def messages(pictures: int, frames: int) -> list[dict]:
        return asking(*[image_part(picture)] * pictures, video_part([picture] * frames))

    limits = MediaLimits(pictures=16)
    for pictures, frames in ((0, 16), (7, 8)):
        assert fit_media(messages(pictures, frames), processor, limits) == messages(pictures, frames)
    with pytest.raises(ValueError, match="hold 9 pictures and videos, .* longest, 8 frames: more than the 64 frames"):
        fit_media(messages(8, 8), processor, limits)
    # others take the frames as pictures
    assert len(fit_media(messages(8, 8), tiny("otterhd")[1], limits)[0]["content"]) == 16


def test_a_slow_body_holds_no_place(app_of):
    """One request never ends; with a single place another is answered, and the slow one is told in the end."""
    app = app_of(slots=1, queue=0, body_seconds=0.2)
    scope_headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
    scope |= {"headers": scope_headers, "scheme": "http", "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)}
    started, sent = asyncio.Event(), []

    async def receive():
        if not started.is_set():
            started.set()
            return {"type": "http.request", "body": b'{"messages": ', "more_body": True}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    async def both():
        slow = asyncio.create_task(app(scope, receive, send))
        await started.wait()
        status, _ = await acall(app, json.dumps(VALID).encode())
        assert status == 200
        await slow

    asyncio.run(both())
    assert sent[0]["status"] == 408 and b"did not arrive within 0.2 seconds" in sent[1]["body"]


def test_bodies_on_their_way_are_bounded_together(app_of):
    app = app_of(slots=1, queue=0, body_bytes=1000)
    app.state.chat.bodies._arriving = 900  # as if others were arriving
    status, message = error_of(call(app, json.dumps(VALID).encode()))
    assert status == 429 and "Too many requests are arriving" in message
    assert app.state.chat.bodies._arriving == 900


def test_fetches_are_bounded_in_number_bytes_and_time(monkeypatch):
    asked = []

    def answer(url, policy):
        asked.append((url, policy.timeout, policy.max_bytes))
        return b"x" * 40

    monkeypatch.setattr("otter_hf.serving.fetch._fetch", answer)
    policy = FetchPolicy(max_bytes=100, timeout=20, max_fetches=3)
    pages = [picture_at(f"https://example.org/{number}") for number in range(4)]
    with pytest.raises(ValueError, match=r"content\[2\].image_url is larger than 20 bytes"):
        MessageReader(MediaLimits(), policy, 1).fetch(asking(*pages[:3]))
    assert [one[2] for one in asked] == [100, 60, 20] and all(one[1] <= 20 for one in asked)
    many = FetchPolicy(max_fetches=3)
    with pytest.raises(ValueError, match=r"content\[3\].image_url is one address more than the 3"):
        MessageReader(MediaLimits(), many, 1).fetch(asking(*pages))
    asked.clear()
    # what is wrong further on is found before anything is fetched
    with pytest.raises(ValueError, match="must be of the type"):
        MessageReader(MediaLimits(), many, 1).fetch(asking(pages[0], {"type": "audio"}))
    assert not asked


def test_a_slow_site_holds_no_slot(app_of, monkeypatch):
    """While a picture is being fetched, with one slot, another request is answered."""
    arrived, go_on = threading.Event(), threading.Event()

    def wait(url, policy):
        arrived.set()
        go_on.wait(60)
        raise ValueError("it was slow")

    monkeypatch.setattr("otter_hf.serving.fetch._fetch", wait)
    app = app_of(slots=1, queue=1)
    slow = {**VALID, "messages": asking(picture_at("https://example.org/a"))}

    async def both():
        first = asyncio.create_task(acall(app, json.dumps(slow).encode()))
        await asyncio.to_thread(arrived.wait, 60)
        assert (await acall(app, json.dumps(VALID).encode()))[0] == 200
        go_on.set()
        assert "it was slow" in error_of(await first)[1]

    asyncio.run(both())


def test_work_ends_when_nobody_waits(tmp_path):
    left = iter([False, False, True])
    reader = MessageReader(MediaLimits(), FetchPolicy(), 1, lambda: next(left))
    messages = reader.fetch(asking(PICTURE, PICTURE))
    with pytest.raises(Cancelled):
        reader.decode(messages)


def test_frames_of_a_film_may_come_by_themselves():
    """As clients of vLLM send them."""

    def read(num_frames=3, end="", of_model=None, **limits):
        pictures = [Image.new("RGB", (8, 8), (40 * number, 0, 0)) for number in range(6)]
        encoded = ",".join(encode_base64(encode_image(picture, "JPEG")) for picture in pictures)
        film = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{encoded}{end}"}}
        reader = MessageReader(MediaLimits(**limits), FetchPolicy(), num_frames)
        (message,) = reader.decode(reader.fetch(asking(film)), of_model)
        return message["content"][0]["video"]

    assert [round(frame.getpixel((4, 4))[0] / 40) for frame in read()] == [0, 2, 4]
    assert [len(read(3, of_model=2)), len(read(None, of_model=2)), len(read(None))] == [3, 2, 6]
    assert len(read(num_frames=16)) == 6
    for asked, message in (
        ({"num_frames": 1, "pictures": 1}, "has more than 4 frames; send fewer of them"),
        ({"image_pixels": 150}, "frame 0 is too large .8 x 8 pixels are more than the limit of 50"),
        ({"end": ",!"}, "video_url, frame 6 cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**asked)


def test_a_film_is_left_between_frames(tmp_path):
    from serving_files import write_video

    film = write_video(tmp_path / "film.mp4", 12).read_bytes()
    frames = []

    def check():
        if len(frames) == 3:
            raise Cancelled

    with open_film(film, limits=FilmLimits(check=check)) as opened, pytest.raises(Cancelled):
        for frame in opened.frames():
            frames.append(frame)
    assert len(frames) == 3


def test_nothing_is_decoded_for_who_was_told_504(app_of, monkeypatch):
    decoded = []
    monkeypatch.setattr("otter_hf.serving.messages.open_image", lambda *_: decoded.append(1))
    release = threading.Event()
    monkeypatch.setattr("otter_hf.serving.fetch._fetch", lambda *_: release.wait(60) and b"")
    app = app_of(request_seconds=0.2)
    request = {**VALID, "messages": asking(picture_at("https://example.org/a"))}

    async def late():
        answer = await acall(app, json.dumps(request).encode())
        release.set()
        await asyncio.gather(*app.state.chat._tasks)
        return answer

    status, message = error_of(asyncio.run(late()))
    assert status == 504 and not decoded and app.state.chat.gate.admitted == 0
