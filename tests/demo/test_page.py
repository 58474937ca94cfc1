"""The page without a browser: what it shows and what it asks the server."""

import pytest
from serving_double import slow_down, wait_until

from otter_hf.cli import main


SETTINGS = (16, 0, 1, 0, 1, 0, 1)  # tokens, temperature, top p, top k, beams, no repeats, length penalty
NO_EXAMPLES = (None, "", "") * 2


@pytest.fixture
def page(server):
    """The module, imported once Gradio is known to be there."""
    from otter_hf.demo import page

    return page


def ask(page, server, message, history=(), examples=NO_EXAMPLES, settings=SETTINGS):
    return page.answer(server.client(), message, list(history), *examples, server.models.names[0], *settings)


def test_the_examples_of_the_package_can_be_asked(page, server):
    answers = set()
    for message, *examples in page.page_examples().values():
        pieces = list(ask(page, server, message, examples=examples))
        assert len(pieces) > 1 and pieces[-1].startswith(pieces[0])
        answers.add(pieces[-1])
    assert len(answers) > 1


def test_settings_reach_the_model(page, server):
    message = {"text": "what?", "files": []}
    greedy = list(ask(page, server, message))
    beams = list(ask(page, server, message, settings=(16, 0, 1, 0, 4, 0, 1)))
    assert len(beams) == 1 < len(greedy)
    short = list(ask(page, server, message, settings=(2, *SETTINGS[1:])))
    assert len(short[-1]) < len(greedy[-1])
    sampled = {list(ask(page, server, message, settings=(16, 1, 1, 0, 1, 0, 1)))[-1] for _ in range(4)}
    assert len(sampled) > 1


def test_a_server_that_knows_openais_settings_only(page, server, monkeypatch):
    """As OpenAI's own and that of transformers; what a visitor chose of the others is said to be refused."""
    from otter_hf.serving import request

    own = ("model", "messages", "stream", "max_tokens", "temperature", "top_p")
    monkeypatch.setattr(request, "KNOWN", {*own})
    assert list(ask(page, server, "what?"))[-1].isalpha()
    (failure,) = ask(page, server, "what?", settings=(16, 0, 1, 0, 1, 3, 1))
    assert isinstance(failure, page.Failure) and "'no_repeat_ngram_size', which this server does not know" in failure


def test_stopping_tells_the_server(page, server):
    slow_down(server.model_of(), 0.02)
    pieces = ask(page, server, {"text": "what?", "files": []}, settings=(500, *SETTINGS[1:]))
    next(pieces)
    pieces.close()  # what Gradio does when a visitor stops
    wait_until(lambda: server.gate.admitted == 0)


def test_what_is_refused_is_an_answer_that_says_so(page, server, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_bytes(b"no picture")
    for name, message in (
        ("bad.png", "bad.png cannot be read as an image"),
        ("notes.txt", "notes.txt is neither a picture nor a video"),
        ("gone.png", "No such file"),
    ):
        (failure,) = ask(page, server, {"text": "what?", "files": [{"path": str(tmp_path / name)}]})
        assert isinstance(failure, page.Failure) and message in failure
    nowhere = openai_client("http://127.0.0.1:1/v1")
    (failure,) = page.answer(nowhere, "what?", [], *NO_EXAMPLES, "model", *SETTINGS)
    assert isinstance(failure, page.Failure)


def openai_client(url):
    import openai

    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_a_message_is_a_text_or_has_files_as_gradio_has_them(page, server):
    picture = next(iter(page.page_examples().values()))[0]["files"][0]
    of_path, of_dict = (
        list(ask(page, server, {"text": "what?", "files": [file]}))[-1] for file in (picture, {"path": picture})
    )
    of_text = list(ask(page, server, "what?"))[-1]
    assert of_path == of_dict != of_text
    # an edited question behind its picture, which is a message of its own
    history = [{"role": "user", "content": [{"type": "file", "file": {"path": picture}}], "metadata": None}]
    assert list(ask(page, server, "what?", history))[-1] == of_path


def test_the_app_is_asked_goes_on_after_an_error_and_answers_again(page, server, tmp_path):
    """The real app, as its browser side and `gradio_client` call it."""
    from gradio_client import Client, handle_file

    (tmp_path / "bad.png").write_bytes(b"no picture")
    blocks = page.build_page(server.client(), tmp_path / "flags")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        inputs = [*NO_EXAMPLES, server.models.names[0], *(16, 0, 1, 0, 1, 0, 1)]

        def say(text, history, *files):
            message = {"text": text, "files": [handle_file(file) for file in files]}
            box, history = client.predict(message, history, *inputs, api_name="/chat")
            assert box["submit_btn"] is True and box["stop_btn"] is False
            return history

        failed = say("what?", [], tmp_path / "bad.png")
        assert failed[-1]["metadata"]["title"] == "No answer"
        assert "bad.png cannot be read as an image" in failed[-1]["content"][0]["text"]
        asked = {"role": "user", "content": [{"type": "text", "text": "and this?"}]}
        after = say("what?", [asked, failed[-1]])
        alone = say("what?", [])
        assert after[-1]["content"] == alone[-1]["content"]  # the failure is no part of the conversation
    finally:
        blocks.close()


def test_the_page_is_built_and_loads_nothing_from_elsewhere(page, server, tmp_path):
    blocks = page.build_page(server.client(), tmp_path / "flags")
    labels = {component.get("props", {}).get("label") for component in blocks.get_config_file()["components"]}
    assert {"Picture 1", "Question 2", "Answer 2", "Top p", "Beams (more than 1: the answer comes at once)"} <= labels
    assert {"Model", "Conversation"} <= labels
    assert not page.THEME._stylesheets and "Share" in page.CSS


def test_the_command_serves_and_shows(page, folders, tmp_path, monkeypatch):
    import gradio

    from otter_hf.loading import load
    from otter_hf.models.skills import Skill
    from otter_hf.serving.session import make_message

    examples = [make_message("user", "what?"), make_message("assistant", "red")]
    skill = tmp_path / "colors.safetensors"
    Skill.compile(*load(folders["otter"], device_map="cpu"), examples).save(skill)
    shown = {}

    def launch(blocks, **options):
        (chat,) = [fn for fn in blocks.fns.values() if fn.api_name == "chat"]
        shown.update(options, chat=chat, models=chat.inputs)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    flags = ["--port", "0", "--flag-folder", str(tmp_path / "flags"), "--device-map", "cpu"]
    assert main(["demo", folders["otter"], "--skill", str(skill), *flags]) == 0
    assert shown["server_port"] == 0 and shown["chat"]
    (models,) = [box for box in shown["models"] if isinstance(box, gradio.Dropdown)]
    assert [name for name, _ in models.choices] == [folders["otter"], f"{folders['otter']}:colors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give models, or the --url of a server"),
        (["model", "--url", "http://localhost:1/v1"], "Give models, or the --url of a server"),
        (["--url", "http://localhost:1/v1", "--skill", "a"], "give it to the server at --url"),
        (["--url", "http://127.0.0.1:1/v1"], "the server at http://127.0.0.1:1/v1 does not list its models"),
    ],
)
def test_bad_input_is_one_sentence(page, arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
