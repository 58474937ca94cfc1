"""`otter-hf skill`, and its file in `otter-hf chat`."""

import json

import pytest
import yaml

from otter_hf.cli import main
from otter_hf.serving.examples import read_examples


@pytest.fixture
def write(tmp_path):
    def write(content) -> str:
        path = tmp_path / "examples.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def test_examples_become_a_skill_that_answers_as_they_do(folder, files, write, tmp_path, capsys):
    examples = write([{"image_path": files[0], "question": "what?", "answer": "red"}])
    output = str(tmp_path / "colors.safetensors")
    assert main(["skill", "make", examples, "--model", str(folder), "--output", output]) == 0
    assert "colors.safetensors: " in capsys.readouterr().out
    assert main(["skill", "show", output]) == 0
    told = capsys.readouterr().out
    assert told.startswith("user: <image> what?\nassistant: red\n") and "1 pictures and films" in told
    asked = ["chat", str(folder), "--max-new-tokens", "4", "--image", files[1], "--prompt", "and this?"]
    assert main([*asked, "--skill", output]) == 0
    answer = capsys.readouterr().out
    assert main([*asked, "--example", files[0], "what?", "red"]) == 0
    assert capsys.readouterr().out == answer
    # each question of a list begins with it
    (tmp_path / "questions.yaml").write_text(
        yaml.safe_dump([{"image_path": files[1], "question": "and this?"}] * 2), encoding="utf-8"
    )
    listed = ["--yaml-file", str(tmp_path / "questions.yaml"), "--output-dir", str(tmp_path / "logs")]
    assert main(["chat", str(folder), "--max-new-tokens", "4", "--skill", output, *listed]) == 0
    (log,) = (tmp_path / "logs").glob("*.json")
    answers = {entry["answer"] for entry in json.loads(log.read_text())["results"].values()}
    assert answers == {answer.split("\n", 1)[1].strip()}
    # a refusal is one sentence
    assert main([*asked, "--skill", examples]) == 2
    assert "is no skill, or damaged" in capsys.readouterr().err


def test_forms_of_examples(files, write):
    picture = {"type": "image", "path": files[0]}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    example = {"image_path": files[0], "question": "what?", "answer": 3}
    messages = read_examples(write({"system": "Be brief.", "examples": [example]}))
    assert messages[0] == system and messages[2]["content"][0]["text"] == "3"
    given = [
        {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "3"},
    ]
    read = read_examples(write({"system": "Be brief.", "messages": given}))
    assert [m["role"] for m in read] == [m["role"] for m in messages]
    assert read[1]["content"][0]["image"].tobytes() == messages[1]["content"][0]["image"].tobytes()
    assert read[1]["content"][1:] == messages[1]["content"][1:] and read[2] == messages[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold a list of examples"),
        ({"examples": [], "system": "a"}, "must hold a list of examples"),
        ({"examples": [{"question": "a"}], "messages": [1]}, "must hold a list of examples"),
        ([{"question": "a", "answer": True}], "reads its answer as true; put it in quotes"),
        ([{"question": "a"}], "give it an answer in words"),
        ([{"answer": "a"}], "give it a question in words"),
        ([{"question": "a", "answer": "b", "image": "c"}], "unknown image; use image_path"),
        ([{"question": "a", "answer": "b", "image_path": "no.png"}], "there is no file no.png"),
        ({"system": 3, "examples": [{"question": "a", "answer": "b"}]}, "write it in words"),
        ({"messages": [{"role": "me", "content": "a"}]}, "with one of the roles system, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "sound", "path": "a"}]}]}, "is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}]}, "there is no file"),
    ],
)
def test_other_files_are_refused(content, message, write):
    with pytest.raises(ValueError, match=message):
        read_examples(write(content))
