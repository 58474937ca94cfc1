"""Gradio's history as messages of the OpenAI API; no Gradio needed."""

import base64

import pytest
from PIL import Image

from otter_hf.demo.history import FAILED, edited, last_question, to_messages


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    return str(tmp_path / "a.png")


URL = "data:image/png;base64," + base64.b64encode(b"pixels").decode()


def test_files_and_texts_of_a_turn_become_one_message(picture):
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": picture}}]},
        {"role": "user", "content": [{"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a dot"},
        {"role": "user", "content": [{"path": picture}, ""]},
    ]
    image = {"type": "image_url", "image_url": {"url": URL}}
    assert to_messages(history) == [
        {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dot"}]},
        {"role": "user", "content": [image]},
    ]


def test_worked_examples_stand_in_front(picture):
    examples = [(picture, "what?", "a dot"), (None, "sure?", "yes"), (picture, "", "unasked"), (None, "what?", "")]
    messages = to_messages([{"role": "user", "content": "and this?"}], examples)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"][0]["image_url"]["url"] == URL
    assert messages[3]["content"] == [{"type": "text", "text": "yes"}]


def test_videos_and_other_files(tmp_path):
    for name in ("film.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"data")
    film = to_messages([{"role": "user", "content": {"path": str(tmp_path / "film.mp4")}}])
    assert film[0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    with pytest.raises(ValueError, match="notes.txt is neither a picture nor a video"):
        to_messages([{"role": "user", "content": {"path": str(tmp_path / "notes.txt")}}])


def test_files_are_told_by_what_is_in_them(tmp_path, monkeypatch):
    """Where the system has no list of kinds, Python 3.11 knows neither WebP nor Matroska by name."""
    monkeypatch.setattr("mimetypes.guess_type", lambda name: (None, None))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp")
    for name, start in (("a.webp", "data:image/webp;base64,"), ("film.mkv", "data:video/")):
        path = tmp_path / name
        path.write_bytes(path.read_bytes() if path.exists() else b"\x1a\x45\xdf\xa3" + bytes(20))
        (part,) = to_messages([{"role": "user", "content": {"path": str(path)}}])[0]["content"]
        assert part[part["type"]]["url"].startswith(start)


def test_a_question_without_an_answer_is_left_out(picture):
    history = [
        {"role": "user", "content": "one", "metadata": None},
        {"role": "assistant", "content": "1", "metadata": {}},
        {"role": "user", "content": {"path": picture}},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "it is broken", "metadata": {"title": FAILED}},
        {"role": "user", "content": "three"},
    ]
    assert [message["content"][0]["text"] for message in to_messages(history)] == ["one", "1", "three"]


def test_the_last_question_and_an_edited_one_keep_their_files(picture):
    file = {"type": "file", "file": {"path": picture}}
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [file]},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "2"},
        {"role": "assistant", "content": "and more"},
    ]
    assert last_question(history) == (history[:2], {"text": "two", "files": [picture]})
    for index in (3, [3, 0]):
        assert last_question(edited(history, index, "new")) == (history[:2], {"text": "new", "files": [picture]})
    together = [{"role": "user", "content": [file, {"type": "text", "text": "two"}]}]
    for index in (0, [0], [0, 0], [0, 1]):
        assert last_question(edited(together, index, "new"))[1] == {"text": "new", "files": [picture]}
    assert last_question(edited(history, 0, "new")) == ([], {"text": "new", "files": []})
    assert last_question([]) == ([], {"text": "", "files": []})
