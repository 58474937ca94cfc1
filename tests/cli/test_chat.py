"""`otter-hf chat` as typed in a terminal."""

import io

import pytest

from otter_hf.cli import main


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_prompts_are_answered_in_turn(folder, pictures, tmp_path, capsys):
    pictures[0].save(tmp_path / "red.png")
    arguments = ["chat", str(folder), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "3"]
    assert main([*arguments, "--prompt", "what is it?", "--prompt", "and now?"]) == 0
    output = capsys.readouterr().out
    assert output.index("> what is it?") < output.index("> and now?")
    # greedy decoding: the same question gets the same words
    assert main([*arguments, "--prompt", "what is it?", "--prompt", "and now?"]) == 0
    assert capsys.readouterr().out == output


def test_interactive_session(folder, pictures, tmp_path, capsys, monkeypatch):
    pictures[0].save(tmp_path / "red.png")
    lines = f"/image {tmp_path / 'red.png'}\nwhat?\n/image nowhere.png\n/clear\nwhat?\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(folder), "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "nowhere.png cannot be read as an image: there is no such file" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "model './nowhere' is neither a folder on this machine nor a Hub id"),
        (["owner/name", "--image", "none.png"], "none.png cannot be read as an image"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, capsys):
    assert main(["chat", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
