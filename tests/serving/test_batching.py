"""Requests that are answered together, as rows of one batch."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serving_double import image_url, slow_down, wait_until


openai = pytest.importorskip("openai", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
httpx = pytest.importorskip("httpx2", reason="comes with the serve extra")


def said(answer) -> str:
    """The text of a completion, or of a stream."""
    if hasattr(answer, "choices"):
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


@pytest.mark.parametrize("family", ["otter", "flamingo", "otterhd"])
def test_answers_at_once_are_those_asked_alone(family, folders, serve, pictures):
    """Ragged pictures and lengths, settings and seeds of their own, streamed or whole, beside requests that fail."""
    server = serve(folders[family])
    rows = []
    hook = server.model_of().register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    images = [image_url(picture) for picture in pictures]
    questions = [
        (("what?", images[0]), {}),
        (("and this one here?", *images[:3]), {"stream": True}),
        (("no picture",), {"max_tokens": 20}),
        (("what?", images[1]), {"temperature": 1.5, "seed": 3}),
        (("what?", images[1]), {"temperature": 1.2, "seed": 4, "top_p": 0.8, "stream": True}),
        (("what?", images[2]), {"frequency_penalty": 1.5, "logit_bias": {"7": 3}}),
        (("what?", images[3]), {"stop": ["a", "e", "x"], "max_tokens": 30}),
        (("what?", images[3]), {"extra_body": {"generation_config": json.dumps({"num_beams": 2})}}),
    ]

    def ask(question) -> str:
        (text, *media), options = question
        return said(server.ask(text, *media, **{"max_tokens": 12, **options}))

    def ask_wrongly(part) -> str:
        with pytest.raises(openai.BadRequestError) as refused:
            server.ask("what?", part)
        return str(refused.value)

    alone = [ask(question) for question in questions]
    assert max(rows) == 2, "the beams"
    slow_down(server.model_of(), 0.003)
    wrong = [image_url(b"no picture"), {"type": "text", "text": "a" * 5000}] * 2
    with ThreadPoolExecutor(12) as pool:
        failing = [pool.submit(ask_wrongly, part) for part in wrong]
        together = list(pool.map(ask, questions))
        assert all("cannot be read" in one.result() or "reads at most" in one.result() for one in failing)
    hook.remove()
    assert together == alone
    assert max(rows) > 2
    text = httpx.get(f"{server.url}/metrics").text
    assert "otter_batch_rows 0" in text and "otter_batch_waiting 0" in text and "otter_batch_tokens 0" in text


def test_a_budget_is_waited_for_and_not_exceeded(folders, serve, pictures):
    server = serve(folders["otter"], batch_tokens=160)
    image = image_url(pictures[0])
    taken = []
    slow_down(server.model_of(), 0.002)
    alone = said(server.ask("what?", image))
    server.model_of().register_forward_pre_hook(
        lambda *_: taken.extend(batch.tokens_taken for batch in server.models.batches)
    )
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: said(server.ask("what?", image)), range(8)))
    assert answers == [alone] * 8
    assert 0 < max(taken) <= 160
    with pytest.raises(openai.BadRequestError, match="this server has room for 160, the answer included"):
        server.ask("a" * 200)
    beams = {"generation_config": '{"num_beams": 8}'}
    with pytest.raises(openai.BadRequestError, match="has room for 20, the answer included"):
        server.ask("what about this?", extra_body=beams)
    # who asks for more than there is room for is cut off
    assert server.ask("what?", max_tokens=1000).usage.total_tokens <= 160


def test_who_leaves_makes_room_for_the_next(folders, serve):
    server = serve(folders["otter"], batch_tokens=1100)
    model = server.model_of()
    slow_down(model, 0.02)
    model.generation_config.eos_token_id = -1
    first = server.ask(max_tokens=1000, stream=True)
    next(first), next(first)  # the role, and a piece of the answer
    (batch,) = server.models.batches
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(server.ask, max_tokens=6)
        wait_until(lambda: batch.num_waiting == 1)
        assert batch.num_running == 1
        first.close()
        assert second.result().usage.completion_tokens == 6
    wait_until(lambda: server.gate.admitted == 0)


def test_a_full_device_is_told_and_outlived(folders, serve):
    server = serve(folders["otter"])
    expected = said(server.ask("what?"))

    def run_out(*_):
        raise torch.OutOfMemoryError("tried to allocate much")

    hook = server.model_of().model.register_forward_pre_hook(run_out)
    with pytest.raises(openai.InternalServerError, match="memory of this server's device is full") as told:
        server.ask("what?")
    with pytest.raises(openai.APIError, match="memory of this server's device is full"):
        said(server.ask("what?", stream=True))
    hook.remove()
    assert told.value.status_code == 503 and said(server.ask("what?")) == expected


def lost_device() -> Exception:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return kind("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")


def test_a_lost_device_is_told(folders, serve):
    """After a device-side assertion a process can only be started again, for which something has to notice it."""
    server = serve(folders["otter"])
    path = f"{server.url}/health"
    for error, status in ((RuntimeError("CUDA error: out of memory"), 200), (lost_device(), 503)):

        def fail(*_, error=error):
            raise error

        hook = server.model_of().model.register_forward_pre_hook(fail)
        with pytest.raises(openai.InternalServerError, match=type(error).__name__):
            server.ask("what?")
        hook.remove()
        assert httpx.get(path).status_code == status
    assert httpx.get(path).json()["error"]["message"] == (
        "The device of this server failed, restart the server: CUDA error: device-side assert triggered."
    )
    with pytest.raises(openai.InternalServerError, match="restart the server") as told:
        server.ask("what?")
    assert told.value.status_code == 503


def test_an_unloaded_model_takes_its_batch_along(folders, serve):
    server = serve(folders["otter"])
    server.ask()
    (loaded,) = server.models.loaded_models.values()
    loaded.delete_model()
    assert server.models.batches == []
    assert said(server.ask()) is not None


def test_a_model_that_answers_is_not_idle(folders):
    from otter_hf.serving.models import ServedModels

    models = ServedModels([folders["otter"]], model_timeout=3600, device_map="cpu")
    (loaded,) = models.loaded_models.values()
    with models.in_use(folders["otter"], loaded.model), models.in_use(folders["otter"], loaded.model):
        loaded._timeout_reached()
        assert loaded.model is not None
    loaded._timeout_reached()
    assert loaded.model is None and not models.loaded_models
