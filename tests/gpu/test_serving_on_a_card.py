"""The server, commands and evaluation on a CUDA card; what is expected is what the CPU says."""

import copy
import json
import threading
import urllib.error
import urllib.request

import pytest
import torch


if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)


from card_models import CARD, CONVERSATIONS, EXAMPLES, FAMILIES, PICTURES, needs_bits, needs_flash, prepare, turn
from transformers.utils import is_flash_attn_2_available

from otter_hf.evaluation.model import ConversationModel
from otter_hf.testing import tiny


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("convolutions_in_float32")]


# ----- server, commands, evaluation -----


@pytest.fixture
def server_of():
    """`server_of(folder, **settings)`: address and models of a server on the card."""
    pytest.importorskip("otter_hf.serving.app", reason="the serve extra is not installed", exc_type=ImportError)
    from otter_hf.serving.app import create_app
    from otter_hf.serving.background import BackgroundServer
    from otter_hf.serving.models import ServedModels
    from otter_hf.serving.settings import ServerSettings

    started = []

    def start(folder, settings=None, **loading):
        models = ServedModels([folder], **loading)
        started.append(BackgroundServer(create_app(models, ServerSettings(**(settings or {})))))
        return started[-1].url, models

    yield start
    for server in started:
        server.stop()


def post(url, content, **options):
    """Status and answer of a request; of a stream its pieces."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 10, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
            if not options.get("stream"):
                return response.status, json.loads(text)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    if errors := [json.loads(line)["error"] for line in lines if "error" in json.loads(line)]:
        return errors[0]["code"], errors[0]["message"]
    deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
    return 200, "".join(delta.get("content") or "" for delta in deltas)


def contents():
    from serving_double import image_url

    words = ("what?", "which colour is it, of all these?", "x")
    asked = [[image_url(picture), {"type": "text", "text": text}] for picture in PICTURES[:3] for text in words]
    return [*asked, [{"type": "text", "text": "only words " * 8}]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_answers_several_clients_at_once(family, folder_of, server_of):
    url, models = server_of(folder_of(family))
    model, _ = models.load_model_and_processor(models.process_model_name(models.names[0]))
    assert model.device == CARD
    asked = contents()
    alone = [post(url, content) for content in asked]
    assert {status for status, _ in alone} == {200} and len({text for _, text in alone}) > 3
    found = [None] * len(asked)

    def ask(index):
        found[index] = post(url, asked[index], stream=index % 2 == 0)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    sampled = [post(url, asked[0], temperature=1.0, seed=3) for _ in range(2)]
    assert sampled[0] == sampled[1]
    status, told = post(url, [{"type": "text", "text": "word " * 10_000}])
    assert status == 400 and "tokens" in told
    assert post(url, asked[0]) == alone[0]


def test_a_server_in_half_precision(folder_of, server_of):
    kind = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    url, _ = server_of(folder_of("otter"), dtype="bfloat16", attn_implementation=kind)
    assert {post(url, content)[0] for content in contents()} == {200}


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_a_server_outlives_a_card_that_is_full(family, folder_of, server_of):
    url, models = server_of(folder_of(family))
    model, _ = models.load_model_and_processor(models.process_model_name(models.names[0]))
    content = contents()[0]
    expected = post(url, content)
    assert post(url, content) == expected  # by now all that is kept of it is there
    taken = torch.cuda.memory_allocated()

    def too_much(*args):
        torch.empty(2**50, dtype=torch.uint8, device=CARD)  # more than any card has: nothing is taken

    hook = model.model.register_forward_pre_hook(too_much)
    for options in ({}, {"stream": True}, {"n": 1, "temperature": 1.0}):
        status, told = post(url, content, **options)
        assert status == 503 and "memory" in told
    hook.remove()
    assert post(url, content) == expected
    # what the failed ones had is free again, though their errors were kept for a while
    assert torch.cuda.memory_allocated() <= taken + 2**20


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "bfloat16"),
        ("--num-beams", "3"),
        ("--temperature", "1", "--seed", "3"),
        pytest.param(("--load-in-4bit",), marks=needs_bits),
        pytest.param(("--attn-implementation", "flash_attention_2", "--dtype", "bfloat16"), marks=needs_flash),
    ],
)
def test_chat_in_a_terminal(options, folder_of, tmp_path, capsys):
    from otter_hf.cli import main

    PICTURES[1].save(tmp_path / "green.png")
    asked = ["--image", str(tmp_path / "green.png"), "--prompt", "what is it?", "--prompt", "and now?"]
    command = ["chat", folder_of("otter"), "--max-new-tokens", "8", *asked, *options]
    outputs = []
    for device in ("cuda", "auto", "cpu") if not options else ("cuda",):
        assert main([*command, "--device", device]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1 and outputs[0].index("> what is it?") < outputs[0].index("> and now?")


@pytest.mark.parametrize("family", [*FAMILIES, "idefics"])
def test_evaluation(family, folder_of, tmp_path):
    folder = folder_of(family) if family != "idefics" else tmp_path / "idefics"
    if family == "idefics":
        for one in tiny("idefics"):
            one.save_pretrained(folder)
    conversations = [[*EXAMPLES, *turn(f"what is {i}?", PICTURES[i])] for i in range(5)]
    found = {}
    for device in ("cpu", "cuda"):
        asked = ConversationModel(folder, device=device)
        assert asked.model.device.type == device
        said = [asked.generate(conversations, batch_size=3, max_new_tokens=6, num_beams=n) for n in (1, 3)]
        scores = asked.log_likelihood(conversations[0], ["red", "it is green", "no"])
        found[device] = said, [tuple(score[1:]) for score in scores], torch.tensor([score[0] for score in scores])
    assert found["cuda"][:2] == found["cpu"][:2]
    torch.testing.assert_close(found["cuda"][2], found["cpu"][2], rtol=1e-3, atol=1e-3)


def test_features_computed_ahead(made, tmp_path):
    from otter_hf.training.features import store_media

    model, processor = copy.deepcopy(made("otter")[0]).to(CARD), made("otter")[1]
    inputs = prepare(processor, CONVERSATIONS).to(CARD)
    with torch.no_grad():
        expected = model(**inputs).logits
        for trained in (True, False):
            one = copy.deepcopy(model).requires_grad_(False)
            one.model.perceiver.requires_grad_(trained)
            store = store_media(one.model, tmp_path / str(trained))
            for _ in range(2):
                torch.testing.assert_close(one(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
            assert store.hits > 0 and store.misses > 0


def test_nearest_neighbours():
    from otter_hf.data.neighbours import nearest_neighbours

    embeddings = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_neighbours(embeddings.to(CARD), 4, block=64).cpu(), nearest_neighbours(embeddings, 4))
