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


def test_stopping_tells_the_server(page, server):
    slow_down(server.model_of(), 0.02)
    pieces = ask(page, server, {"text": "what?", "files": []}, settings=(500, *SETTINGS[1:]))
    next(pieces)
    pieces.close()  # what Gradio does when a visitor stops
    wait_until(lambda: server.gate.admitted == 0)


def test_what_the_server_refuses_is_shown(page, server, tmp_path):
    import gradio

    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_bytes(b"no picture")
    for name, message in (("bad.png", "cannot be read as an image"), ("notes.txt", "neither a picture nor a video")):
        with pytest.raises(gradio.Error, match=message):
            list(ask(page, server, {"text": "what?", "files": [str(tmp_path / name)]}))


def test_the_page_is_built_and_loads_nothing_from_elsewhere(page, server, tmp_path):
    blocks = page.build_page(server.client(), tmp_path / "flags")
    labels = {component.get("props", {}).get("label") for component in blocks.get_config_file()["components"]}
    assert {"Picture 1", "Question 2", "Answer 2", "Top p", "Beams (more than 1: the answer comes at once)"} <= labels
    assert not page.THEME._stylesheets


def test_the_command_serves_and_shows(page, folders, tmp_path, monkeypatch):
    import gradio

    shown = {}

    def launch(blocks, **options):
        (chat,) = [fn for fn in blocks.fns.values() if fn.api_name == "chat"]
        shown.update(options, chat=chat)

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    flags = ["--port", "1234", "--flag-folder", str(tmp_path / "flags"), "--device-map", "cpu"]
    assert main(["demo", folders["otter"], *flags]) == 0
    assert shown["server_port"] == 1234 and shown["chat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give models, or the --url of a server"),
        (["model", "--url", "http://localhost:1/v1"], "Give models, or the --url of a server"),
        (["--url", "http://127.0.0.1:1/v1"], "the server at http://127.0.0.1:1/v1 does not list its models"),
    ],
)
def test_bad_input_is_one_sentence(page, arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
