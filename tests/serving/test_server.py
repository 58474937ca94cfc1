"""The server as OpenAI's client sees it."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from serving_double import image_url, png, slow_down, video_url, wait_until
from serving_files import write_video

from otter_hf.loading import load
from otter_hf.models.generation import end_tokens
from otter_hf.serving.media import image_part, read_frames, video_part
from otter_hf.serving.session import ChatSession


openai = pytest.importorskip("openai", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
httpx = pytest.importorskip("httpx2", reason="comes with the serve extra")


JSON = {"Content-Type": "application/json"}
# one, as making one takes a moment; a connection for each request, as some of them end theirs
http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


def said(completion) -> str:
    return completion.choices[0].message.content


def streamed(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def whole_letters(text: str) -> str:
    """The server does not say the first bytes of a letter whose others were cut off."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()


@pytest.mark.parametrize("family", ["otter", "flamingo", "otterhd"])
def test_answers_are_those_of_the_model(family, folders, serve, pictures, tmp_path):
    """One picture, several, a video, an in-context conversation, streamed or whole: as in a chat in the terminal."""
    server = serve(folders[family])
    session = ChatSession(*load(folders[family], device_map="cpu"), reuse_cache=False)
    film = write_video(tmp_path / "film.mp4", 12)

    def expected(*media):
        session.clear()
        return whole_letters(session.ask("what?", list(media), max_new_tokens=6))

    one = [image_url(pictures[0])]
    assert said(server.ask("what?", *one)) == expected(image_part(pictures[0]))
    assert streamed(server.ask("what?", *one, stream=True)) == expected(image_part(pictures[0]))
    two = [image_url(picture) for picture in pictures[:2]]
    assert said(server.ask("what?", *two)) == expected(*map(image_part, pictures[:2]))
    assert said(server.ask("what?")) == expected()
    frames = read_frames(film, "film", 3)
    options = {"extra_body": {"chat_template_kwargs": {"num_frames": 3}}}
    assert said(server.ask("what?", video_url(film.read_bytes()), **options)) == expected(video_part(frames))

    session.clear()
    session.add_example("what?", "red", [image_part(pictures[0])])
    session.add_example("what?", "green", [image_part(pictures[1])])
    answer = whole_letters(session.ask("what?", [image_part(pictures[2])], max_new_tokens=6))
    text = {"type": "text", "text": "what?"}
    messages = [
        {"role": "user", "content": [image_url(pictures[0]), text]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [image_url(pictures[1]), text]},
        {"role": "assistant", "content": [{"type": "text", "text": "green"}]},
        {"role": "user", "content": [image_url(pictures[2]), text]},
    ]
    completion = server.client().chat.completions.create(
        model=folders[family], messages=messages, max_tokens=6, temperature=0
    )
    assert said(completion) == answer
    assert completion.usage.completion_tokens <= 6 < completion.usage.prompt_tokens


def test_models_are_listed_and_chosen(folders, serve):
    server = serve(folders["otter"], folders["otterhd"])
    client = server.client()
    assert [model.id for model in client.models.list()] == [folders["otter"], folders["otterhd"]]
    assert client.models.retrieve(folders["otterhd"]).id == folders["otterhd"]
    assert server.ask(model=folders["otterhd"]).model == folders["otterhd"]
    for call in (lambda: server.ask(model="gpt-4"), lambda: client.models.retrieve("gpt-4")):
        with pytest.raises(openai.NotFoundError, match="has no model 'gpt-4'"):
            call()


def test_sampling_and_generation_settings(folders, serve, pictures):
    server = serve(folders["otter"])
    image = image_url(pictures[0])
    sampled = [said(server.ask("what?", image, max_tokens=16, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    # who says from how many tokens to draw wants one drawn
    # in words of transformers, or as clients of vLLM say it
    cuts = [{"generation_config": '{"top_k": 200}'}, {"top_k": 200}, {"min_p": 1e-9, "top_k": -1}]
    for cut in ({"top_p": 0.999}, *({"extra_body": cut} for cut in cuts)):
        drawn = {said(server.ask("what?", image, max_tokens=16, temperature=None, seed=i, **cut)) for i in (1, 2)}
        assert len(drawn) == 2
    beams = {"generation_config": '{"num_beams": 3, "no_repeat_ngram_size": 2}'}
    whole = said(server.ask("what?", image, max_tokens=12, extra_body=beams))
    assert whole != said(server.ask("what?", image, max_tokens=12))
    assert streamed(server.ask("what?", image, max_tokens=12, extra_body=beams, stream=True)) == whole


def test_biases_and_penalties(shared_server, pictures):
    image = image_url(pictures[0])
    tokenizer = shared_server.processor_of().tokenizer
    plain = said(shared_server.ask("what?", image, max_tokens=12))
    # what a client sends although it asks for nothing
    nothing = {"n": 1, "tool_choice": "none", "modalities": ["text"], "logit_bias": {}, "seed": 2**33 + 1}
    nothing |= {
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "extra_body": {"parallel_tool_calls": True},
    }
    assert said(shared_server.ask("what?", image, max_tokens=12, **nothing)) == plain
    token = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    forced = said(shared_server.ask("what?", image, max_tokens=4, logit_bias={str(token): 100}))
    assert forced == "aaaa"
    for name in ("frequency_penalty", "presence_penalty"):
        less = said(shared_server.ask("what?", image, max_tokens=12, logit_bias={str(token): 100}, **{name: 2}))
        assert less == "a" * 12, "a bias of 100 outweighs a penalty of 2"
    # who measures speed wants answers of a known length
    end, *_ = end_tokens(shared_server.model_of().generation_config)
    for least, length in (({}, 1), ({"min_tokens": 3}, 4), ({"min_tokens": 90}, 12), ({"ignore_eos": True}, 12)):
        ended = shared_server.ask(max_tokens=12, logit_bias={str(end): 100}, extra_body=least)
        assert ended.usage.completion_tokens == length
        assert ended.choices[0].finish_reason == ("length" if length == 12 else "stop")


def test_penalties_are_openais():
    from otter_hf.serving.generation import RepeatPenalty

    ids, scores = torch.tensor([[3, 3, 1, 2, 2]]), torch.zeros(1, 4)
    penalised = RepeatPenalty(prompt_length=2, frequency=0.5, presence=0.25)(ids, scores)
    assert penalised.tolist() == [[0, -0.75, -1.25, 0]]


def test_a_browser_asks_before_it_sends(folders, serve):
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    allowed, closed = serve(folders["otter"], allow_origins=("http://localhost:3000",)), serve(folders["otter"])
    url = f"{allowed.url}/v1/chat/completions"
    answer = http.options(url, headers=preflight)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == preflight["Origin"]
    assert http.options(url, headers={**preflight, "Origin": "http://a.b"}).status_code == 400
    assert http.options(f"{closed.url}/v1/chat/completions", headers=preflight).status_code == 400
    assert http.options(url).headers["allow"] == "GET, POST, OPTIONS"


def test_order_of_parts_is_kept(folders, serve, pictures):
    server = serve(folders["otter"])
    seen = []
    server.model_of().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    parts = [{"type": "text", "text": "first:"}, image_url(pictures[0]), {"type": "text", "text": "second:"}]
    server.ask("?", *parts, image_url(pictures[1]), max_tokens=1)
    prompt = server.processor_of().decode(torch.cat(seen, dim=1)[0])
    assert prompt == "<s>User: first:<image>second:<image>? GPT:<answer>"


def test_stop_strings_and_lengths(folders, serve, pictures):
    server = serve(folders["otter"])
    image = image_url(pictures[0])
    full = server.ask("what?", image, max_tokens=20)
    assert full.choices[0].finish_reason == "length"
    text = said(full)
    stop = text[4:7]  # several tokens
    stopped = server.ask("what?", image, max_tokens=20, stop=[stop, "never"])
    assert said(stopped) == text[: text.index(stop)].rstrip()
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < full.usage.completion_tokens
    assert streamed(server.ask("what?", image, max_tokens=20, stop=stop, stream=True)) == said(stopped)
    # who asks for more than the server gives is cut off
    short = serve(folders["otter"], new_tokens=3).ask("what?", image, max_tokens=20)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (3, "length")


def test_a_stream_ends_as_openai_ends_it(folders, serve):
    server = serve(folders["otter"])
    chunks = list(server.ask(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0
    *_, last, usage = server.ask(stream=True, stream_options={"include_usage": True})
    assert last.choices[0].finish_reason and last.usage is None
    assert not usage.choices and usage.usage == chunks[-1].usage
    counted = server.ask(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    so_far = [chunk.usage.total_tokens for chunk in counted if not chunk.choices or chunk.choices[0].delta.content]
    assert so_far == sorted(so_far) and so_far[-1] == usage.usage.total_tokens > usage.usage.prompt_tokens
    body = {"messages": [{"role": "user", "content": "what?"}], "stream": True, "max_tokens": 2}
    lines = http.post(f"{server.url}/v1/chat/completions", json=body).text.strip().splitlines()
    assert lines[-1] == "data: [DONE]"


def test_api_key(folders, serve):
    server = serve(folders["otter"], api_key="secret")
    assert said(server.ask()) is not None
    assert http.get(f"{server.url}/v1/models", headers={"Authorization": "bearer secret"}).status_code == 200
    server.key = "wrong"
    with pytest.raises(openai.AuthenticationError, match="Send the API key"):
        server.ask()
    assert http.get(f"{server.url}/v1/models").status_code == 401
    assert http.get(f"{server.url}/metrics").status_code == 401
    assert http.get(f"{server.url}/health").json() == {"status": "ok"}
    for path, method in (("/v1/responses", http.post), ("/v1/engines", http.get)):
        message = method(f"{server.url}{path}").json()["error"]["message"]
        assert f"{path}; it has POST /v1/chat/completions" in message


def huge_png() -> bytes:
    """Few bytes that would be 190 MB of pixels."""
    return png(Image.new("1", (8_000, 8_000)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (image_url(b"no picture"), "cannot be read as an image"),
        (image_url(huge_png()), "8000 x 8000 pixels are more than the limit of 10000000"),
        (video_url(b"no video"), "cannot be read as a video"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,????"}}, "cannot be read"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "reads no such address"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "reads no such address"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}, "not on the public internet"),
        ({"type": "image_url", "image_url": {"url": "http://[::ffff:10.0.0.1]/"}}, "not on the public internet"),
        ({"type": "image_url", "image_url": {"url": "http://2130706433/"}}, "not on the public internet"),
        ({"type": "image_url", "image_url": {"url": "gopher://a/"}}, "reads no such address"),
        ({"type": "image_url", "image_url": 5}, r"messages\[0\].content\[0\].image_url must be"),
        ({"type": "image_url"}, "must be"),
        ({"type": "audio"}, "must be of the type"),
        (7, "must be of the type"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_media_are_refused_and_the_server_lives_on(part, message, stream, shared_server):
    with pytest.raises(openai.BadRequestError, match=message):
        shared_server.ask("what?", part, stream=stream)
    assert said(shared_server.ask()) is not None
    assert (shared_server.gate.admitted, shared_server.gate.running) == (0, 0)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "messages must be a list"),
        ({"messages": []}, 400, "messages must be a list"),
        ({"messages": ["hello"]}, 400, r"messages[0].role must be one of"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "role must be one of"),
        ({"messages": [{"role": "user"}]}, 400, "content must be a text or a list of parts"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "must alternate"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            400,
            "messages[1] is the last and of the role assistant: end with a message of the role user",
        ),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "the model reads at most"),
        ({"temperature": "hot"}, 400, "temperature must be a number from 0 to 2, not 'hot'"),
        ({"temperature": float("nan")}, 400, "temperature must be a number"),
        ({"max_tokens": 0}, 400, "max_tokens must be a whole number of 1 or more"),
        ({"max_tokens": True}, 400, "max_tokens must be a whole number"),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            400,
            "max_tokens is 5, and max_completion_tokens 6, which are",
        ),
        ({"temperature": 0.7, "do_sample": False}, 400, "temperature is 0.7, which draws tokens, and do_sample false"),
        (
            {"temperature": 0, "do_sample": True},
            400,
            "temperature is 0, which takes the likeliest, and do_sample true",
        ),
        ({"n": 17}, 400, "n is 17; this server gives at most 16 at a time"),
        ({"n": 0}, 400, "n must be a whole number of 1 or more, not 0"),
        ({"n": 2, "num_beams": 3}, 400, "n is 2, and num_beams 3: beams have one answer and no logprobs"),
        ({"logprobs": True, "num_beams": 3}, 400, "logprobs is true, and num_beams 3"),
        ({"logprobs": 5}, 400, "logprobs must be true or false, not 5"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs must be a whole number from 0 to 20, not 21"),
        ({"top_logprobs": 2}, 400, "top_logprobs is 2, which needs logprobs: true"),
        (
            {"tools": [{"type": "function"}]},
            400,
            "tools is [{'type': 'function'}], which this server does",
        ),
        ({"tool_choice": "required"}, 400, "tool_choice is 'required'"),
        ({"modalities": ["text", "audio"]}, 400, "modalities is ['text', 'audio']"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort is 'high'"),
        ({"verbosity": "low"}, 400, "verbosity is 'low'"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is"),
        ({"store": True}, 400, "store is True"),
        ({"stream_options": {"include_all": True}}, 400, "stream_options must be an object with include_usage"),
        ({"presence_penalty": 99}, 400, "presence_penalty must be a number from -2 to 2, not 99"),
        ({"frequency_penalty": "a"}, 400, "frequency_penalty must be a number"),
        ({"seed": 2**63}, 400, "seed must be a whole number from"),
        ({"logit_bias": [5]}, 400, "logit_bias must be an object"),
        ({"logit_bias": {"five": 1}}, 400, "logit_bias has the key 'five'"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias[5] must be a number from -100 to 100"),
        ({"logit_bias": {"99999999": 1}}, 400, "logit_bias has the token id 99999999"),
        ({"messages": [{"role": "user", "content": "a", "name": "Bob"}]}, 400, "messages[0] has 'name'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, 400, "of the type text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "b"}]}]},
            400,
            "messages[0].content[0] is of the type text and has 'image_url'",
        ),
        ({"stop": [""]}, 400, "stop must hold texts"),
        ({"stop": 5}, 400, "stop must be a text"),
        ({"generation_config": '{"max_new_tokens": 100000}'}, 400, "generation_config must be a JSON object with"),
        ({"generation_config": '{"num_beams": 1000}'}, 400, "num_beams must be a whole number from 1 to 8"),
        ({"generation_config": "{"}, 400, "generation_config is not JSON"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template_kwargs may hold"),
        ({"chat_template_kwargs": {"num_frames": -1}}, 400, "num_frames must be"),
        ({"logit_bias": {"5": "x"}}, 400, "logit_bias[5] must be a number"),
        ({"unknown": 1}, 422, "'unknown', which this server does not know; leave it out. Beside OpenAI's fields"),
        ({"moderation": {"model": "a"}}, 400, "moderation is {'model': 'a'}, which this server does not support"),
        ({"min_p": 2}, 400, "min_p must be a number from 0 to 1, not 2"),
        ({"top_k": 5, "generation_config": '{"top_k": 6}'}, 400, "top_k is 5, and 6 in generation_config"),
        ({"ignore_eos": 1}, 400, "ignore_eos must be true or false, not 1"),
        ({"model": 5}, 400, "model must be a name"),
    ],
)
def test_bad_requests_are_named(body, status, message, shared_server):
    body = {"messages": [{"role": "user", "content": "what?"}], **body} if body else {}
    url = f"{shared_server.url}/v1/chat/completions"
    response = http.post(url, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert message in told["message"]
    assert told["code"] == ("context_length_exceeded" if "reads at most" in message else status)
    assert said(shared_server.ask()) is not None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_object(content, shared_server):
    response = http.post(f"{shared_server.url}/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "The body of the request is" in message or "nested more than 64 deep" in message


def test_too_large_bodies(shared_server, pictures):
    url = f"{shared_server.url}/v1/chat/completions"

    def chunks():  # without a Content-Length
        for _ in range(40):
            yield b"a" * 100_000

    for content in (b"a" * 4_000_000, chunks()):
        response = http.post(url, content=content, headers=JSON)
        assert response.status_code == 413
    assert "send smaller pictures" in response.json()["error"]["message"]
    assert shared_server.gate.admitted == 0


def test_many_pictures_are_refused_together(shared_server):
    dot = image_url(Image.new("RGB", (1, 1)))
    with pytest.raises(openai.BadRequestError, match="more than a request may hold"):
        shared_server.ask("what?", *[dot] * 20)
    # each within the limit of a picture, together too many pixels
    large = image_url(Image.new("1", (3000, 3000)))
    with pytest.raises(
        openai.BadRequestError, match=r"more than a request may hold|more than the limit of \d+\); send a smaller one"
    ):
        shared_server.ask("what?", *[large] * 4)


def test_twenty_at_once(folders, serve, pictures):
    """All are answered, never more than the slots are in memory, and nothing is left behind."""
    server = serve(folders["otter"], slots=2, queue=20)
    most = []
    hook = server.model_of().register_forward_pre_hook(lambda *_: most.append(server.gate.running))
    expected = [said(server.ask("what?", image_url(picture))) for picture in pictures]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda i: said(server.ask("what?", image_url(pictures[i % 4]))), range(20)))
    hook.remove()
    assert answers == expected * 5
    assert max(most) == 2
    assert (server.gate.admitted, server.gate.running) == (0, 0)


def test_a_full_queue_is_said(folders, serve):
    server = serve(folders["otter"], slots=1, queue=1)
    slow_down(server.model_of(), 0.05)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, max_tokens=20)
        wait_until(lambda: server.gate.running == 1)
        second = pool.submit(server.ask, max_tokens=1)
        wait_until(lambda: server.gate.admitted == 2)
        with pytest.raises(openai.RateLimitError, match="Too many requests are waiting") as refused:
            server.ask()
        assert refused.value.response.headers["Retry-After"] == "1"
        assert said(first.result()) and second.result()
    assert said(server.ask())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream, folders, serve):
    server = serve(folders["otter"], slots=1, queue=0)
    steps = []
    slow_down(server.model_of(), 0.02)
    server.model_of().register_forward_pre_hook(lambda *_: steps.append(1))
    server.model_of().generation_config.eos_token_id = -1
    if stream:
        chunks = server.ask(max_tokens=1000, stream=True)
        next(chunks)
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.5).chat.completions.create(
                model=server.models.names[0], messages=[{"role": "user", "content": "what?"}], max_tokens=1000
            )
    wait_until(lambda: server.gate.admitted == 0)
    assert len(steps) < 1000
    assert said(server.ask()) is not None
    assert "otter_cancelled_total 1" in http.get(f"{server.url}/metrics").text


def test_who_leaves_the_queue_is_forgotten(folders, serve):
    server = serve(folders["otter"], slots=1, queue=1)
    slow_down(server.model_of(), 0.02)
    server.model_of().generation_config.eos_token_id = -1
    first = server.ask(max_tokens=1000, stream=True)
    next(first)
    with pytest.raises(openai.APITimeoutError):
        server.client(timeout=0.3).chat.completions.create(
            model=server.models.names[0], messages=[{"role": "user", "content": "what?"}], max_tokens=1
        )
    wait_until(lambda: server.gate.admitted == 1)
    first.close()
    wait_until(lambda: server.gate.admitted == 0)


def test_an_answer_that_takes_too_long(folders, serve):
    server = serve(folders["otter"], request_seconds=0.5)
    slow_down(server.model_of(), 0.02)
    server.model_of().generation_config.eos_token_id = -1
    with pytest.raises(openai.InternalServerError, match="not finished in time") as late:
        server.ask(max_tokens=1000)
    assert late.value.status_code == 504 and late.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError, match="not finished in time"):
        list(server.ask(max_tokens=1000, stream=True))
    wait_until(lambda: server.gate.admitted == 0)


def test_a_failing_model_is_an_error_not_an_end(folders, serve):
    server = serve(folders["otter"])
    hook = server.model_of().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="The server failed to answer: ZeroDivisionError"):
        server.ask()
    hook.remove()
    assert said(server.ask()) is not None
    assert server.gate.admitted == 0


def test_answers_are_finished_before_the_server_ends(folders, serve):
    server = serve(folders["otter"])
    slow_down(server.model_of(), 0.02)
    server.model_of().generation_config.eos_token_id = -1
    chunks = server.ask(max_tokens=30, stream=True)
    next(chunks)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(server.stop)
        assert list(chunks)[-1].usage.completion_tokens == 30
        assert stopped.result()
    with pytest.raises(openai.APIConnectionError):
        server.ask()


def test_metrics(folders, serve, pictures):
    server = serve(folders["otter"])
    usage = server.ask("what?", image_url(pictures[0])).usage
    with pytest.raises(openai.BadRequestError):
        server.ask("what?", image_url(b"no"))
    text = http.get(f"{server.url}/metrics").text
    assert 'otter_requests_total{status="200"} 1' in text
    assert 'otter_requests_total{status="400"} 1' in text
    assert f"otter_prompt_tokens_total {usage.prompt_tokens}" in text
    assert f"otter_completion_tokens_total {usage.completion_tokens}" in text
    assert "otter_running 0" in text and "otter_waiting 0" in text
    assert "otter_request_seconds_total " in text
