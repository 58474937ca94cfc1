"""The conversation of `otter-hf chat`: what is typed and pasted, and what is said about it."""

import os
import pty
import re
import select
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from serving_files import write_video

from otter_hf.cli.chat_commands import COMMANDS, parse_line, split_paths
from otter_hf.cli.chat_terminal import Chat, Completer, line_editor
from otter_hf.serving.batch import read_questions


class Session:
    """A conversation that only listens; `answers` are said, or raised, one after the other."""

    skill = None

    def __init__(self, processor, answers=()):
        self.processor, self.answers = processor, list(answers)
        self.asked, self.examples, self.cleared = [], [], 0

    def ask(self, question, media=(), streamer=None, **options):
        self.asked.append((question, len(media)))
        answer = self.answers.pop(0) if self.answers else "yes"
        if streamer is None:
            return answer
        streamer.put(torch.tensor([[1, 2]]))  # the prompt
        words, interrupted = (answer, False) if isinstance(answer, str) else ("half an ans", True)
        for token in self.processor.tokenizer(words, add_special_tokens=False)["input_ids"]:
            streamer.put(torch.tensor([token]))
        if interrupted:
            raise answer
        streamer.end()
        return answer

    def add_example(self, *example):
        self.examples.append(example)

    def clear(self):
        self.cleared += 1


@pytest.fixture
def talk(processor, tmp_path, capsys):
    """Types keys into the line editor; gives the session and what was shown."""

    def talk(keys, answers=(), **options):
        session = Session(processor, answers)
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(keys + "\x04")  # Ctrl-D at the end
            Chat(session, [], options, 4).follow(line_editor(tmp_path / "history"), keeps_on=True)
        captured = capsys.readouterr()
        return session, captured.out, captured.err

    return talk


@pytest.fixture
def files(pictures, tmp_path, monkeypatch):
    """Two pictures and a film in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures[0].save(tmp_path / "red.png")
    pictures[1].save(tmp_path / "it's two words.png")
    write_video(tmp_path / "ramp.mp4", 12)
    return tmp_path


def pasted(text):
    return f"\x1b[200~{text}\x1b[201~"


def test_what_is_pasted_is_one_message(talk):
    session, out, _ = talk(f"first\r{pasted('one' + chr(10) + '/two' + chr(13) + chr(10) + 'three')} four\r")
    assert session.asked == [("first", 0), ("one\n/two\nthree four", 0)]
    assert out == "yes\nyes\n"
    assert talk("a\x1b\rb\r")[0].asked == [("a\nb", 0)]  # Alt-Enter


def test_commands_in_front_of_what_is_pasted(talk, files):
    session, _, err = talk(pasted("/image ~/red.png\n/video ~/ramp.mp4\nwhat?\nand why?") + "\r")
    assert session.asked == [("what?\nand why?", 2)] and not err


def test_lines_are_edited_and_remembered(talk, tmp_path):
    session, *_ = talk("whit\x1b[D\x7fa\x05 is it?\r")  # left, backspace, a, end of line
    assert session.asked == [("what is it?", 0)]
    again, *_ = talk("\x1b[A\r")  # up: a line of the session before
    assert again.asked == session.asked
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600


def test_completion(files):
    def complete(text):
        return [found.text for found in Completer().get_completions(Document(text), CompleteEvent())]

    assert complete("/ima") == ["/image"] and complete("/image ~/re") == complete("/example ~/re") == ["d.png"]
    assert not complete("what? ~/re") and not complete("wha")


def test_ctrl_c_stops_the_answer_and_says_how_to_leave(talk, files):
    session, out, _ = talk("/image ~/red.png\rone\rtwo\r", [KeyboardInterrupt(), "two has come"])
    assert session.asked == [("one", 1), ("two", 1)]  # the picture still waits
    stopped = out.index("(stopped)")
    assert out.index("half an ans") < stopped < out.index("leave with Ctrl-D or /quit")
    # nothing of the answer before is in the next one
    assert out.endswith("two has come\n") and "half an anstwo" not in out


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk):
    session, out, _ = talk("wrong\x03what?\r")
    assert session.asked == [("what?", 0)] and "Ctrl-D or /quit leaves." in out


@pytest.mark.parametrize("leave", ["/quit", "/exit", " /quit "])
def test_leaving(talk, leave):
    assert talk(f"{leave}\rnever\r")[0].asked == []


def test_help_names_every_command(talk):
    session, out, _ = talk("/help\r")
    assert not session.asked and all(name in out for name in COMMANDS)


def test_pictures_and_films_are_confirmed(talk, files):
    home = files.as_posix()
    session, out, err = talk(
        f"/image ~/red.png 'file://{home}/red.png'\r/image {home}/it's two words.png\r/video ~/ramp.mp4\rwhat?\r"
        "/example \"~/it's two words.png\" what's this?::green\r/clear\rwhat?\r"
    )
    assert not err
    assert "~/red.png (20 x 40), file://" in out and "your next message has 2 pictures." in out
    assert "it's two words.png (28 x 40); your next message has 3 pictures." in out
    assert "~/ramp.mp4 (4 frames of 32 x 24); your next message has 3 pictures and 1 film." in out
    ((question, answer, media),) = session.examples
    assert (question, answer, len(media)) == ("what's this?", "green", 1)
    assert session.asked == [("what?", 4), ("what?", 0)] and session.cleared == 1


def test_pictures_and_films_at_addresses(talk, files):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=files)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        session, out, err = talk(f"/image {url}/red.png\r/video {url}/ramp.mp4\r/image {url}/none.png\rwhat?\r")
        server.shutdown()
    assert session.asked == [("what?", 2)]
    assert f"{url}/red.png (20 x 40)" in out and "1 picture and 1 film" in out
    assert f"{url}/none.png cannot be fetched" in err  # beside what the server logs


def test_files_of_many_questions(files):
    (files / "questions.yaml").write_text("- {question: a, image_path: [~/red.png, 'https://a.b/c.png']}\n" * 2)
    assert len(read_questions(files / "questions.yaml")) == 2  # fetched when it is asked about
    for name in ("red.png", "[red.png]"):  # beside the list
        (files / "questions.yaml").write_text(f"- {{question: a, image_path: {name}}}")
        (entry,) = read_questions(files / "questions.yaml")
        assert entry["image_path"] == ([str(files / "red.png")] if name[0] == "[" else str(files / "red.png"))
    (files / "questions.yaml").write_text("- {question: a, video_path: ~/none.mp4}")
    with pytest.raises(ValueError, match="entry 0: there is no file ~/none.mp4"):
        read_questions(files / "questions.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imgae cat.png", "/imgae is no command; did you mean /image?"),
        ("/Help", "did you mean /help?"),
        ("/home/me/cat.png", "/image adds a picture"),
        ("/?", "/? is no command; /help lists them"),
        ("/image", "write /image PATH"),
        ("/video ", "write /video PATH"),
        ("/clear all", "/clear takes nothing behind it"),
        ("/image 'cat.png", "has a quote without its end"),
        ("/image none.png", "none.png cannot be read as an image: there is no such file"),
        ("/video ~nobody-here/none.mp4", "there is no home folder of that name"),
        ("/example cat.png what?", "write /example PATH QUESTION::ANSWER"),
    ],
)
def test_what_is_refused_does_not_reach_the_model(processor, capsys, line, message):
    session = Session(processor)
    Chat(session, [], {}, 4).follow(iter([line, "what?", None]).__next__)
    assert session.asked == [("what?", 0)]
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_lines_that_are_no_commands():
    assert parse_line("//etc is what?") == (None, "/etc is what?")
    assert parse_line("what is /image?") == (None, "what is /image?")
    assert split_paths("a.png 'b c.png' d\\ e.png") == ["a.png", "b c.png", "d e.png"]


def test_stop_strings_are_not_shown(talk):
    assert talk("what?\r", ["a cat###User"], stop_strings=["###"])[1] == "a cat\n"
    assert talk("what?\r", ["a cat"], num_beams=2)[1] == "a cat\n"


def test_an_answer_cannot_command_a_terminal(talk, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert talk("what?\r", ["a\x1b[2Jb\tc\nd"])[1].endswith("a[2Jb\tc\nd\n")


@pytest.mark.slow
def test_in_a_terminal(model, processor, files):
    """The command in a pseudo terminal: an answer, Ctrl-C while it comes, a second one, leaving."""
    model.generation_config.eos_token_id = None
    model.save_pretrained(files / "model")
    processor.save_pretrained(files / "model")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "otter_hf.cli", "chat", str(files / "model"), "--max-new-tokens"]
    environment = {**os.environ, "TERM": "xterm", "HF_HOME": str(files)}
    shown = ""

    def wait_for(pattern, seconds=120):
        nonlocal shown
        while not (found := re.search(pattern, shown, re.DOTALL)):
            assert select.select([ours], [], [], seconds)[0], shown
            shown += os.read(ours, 1 << 16).decode(errors="replace")
            if "\x1b[6n" in shown:  # the editor asks for the place of the cursor
                shown = shown.replace("\x1b[6n", "")
                os.write(ours, b"\x1b[1;1R")
        shown = shown[found.end() :]

    with subprocess.Popen(
        [*command, "1900"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            wait_for("/help lists commands")
            wait_for("> ")
            os.write(ours, b"/image ~/red.png\r")
            wait_for(r"20 x 40\); your next message has 1 picture")
            os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\r")
            wait_for(r"[^\x1b\s\u2800-\u28ff]{20}")  # not the spinner
            os.kill(process.pid, 2)
            wait_for(r"\(stopped\).*leave with Ctrl-D or /quit")
            os.write(ours, b"/quit\r")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(ours)
    assert "one\n+two" in (files / "otter_hf_chat_history").read_text()
