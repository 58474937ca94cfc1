"""`otter-hf chat` as typed in a terminal."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration, FlamingoProcessor
from otter_hf.cli import main
from otter_hf.evaluation.model import ConversationModel
from otter_hf.serving import batch


def chat(capsys, folder, *arguments) -> str:
    assert main(["chat", str(folder), "--max-new-tokens", "4", *arguments]) == 0
    return capsys.readouterr().out


def test_prompts_are_answered_in_turn(folder, files, capsys):
    prompts = ["--prompt", "what is it?", "--prompt", "and now?"]
    output = chat(capsys, folder, "--image", files[0], *prompts)
    assert output.index("> what is it?") < output.index("> and now?")
    # greedy decoding: the same question gets the same words, another picture others
    assert chat(capsys, folder, "--image", files[0], *prompts) == output
    assert chat(capsys, folder, "--image", files[1], *prompts) != output


def test_every_medium_and_example_counts(folder, files, capsys, tmp_path):
    ask = ["--prompt", "what?", "--max-new-tokens", "12"]
    outputs = [
        chat(capsys, folder, *ask),
        chat(capsys, folder, *ask, "--image", files[0]),
        chat(capsys, folder, *ask, "--image", files[0], "--image", files[1]),
        chat(capsys, folder, *ask, "--video", files[2]),
        chat(capsys, folder, *ask, "--video", files[2], "--num-frames", "1"),
        chat(capsys, folder, *ask, "--image", files[0], "--example", files[1], "what?", "green"),
    ]
    assert len(set(outputs)) == len(outputs)
    # a folder that was trained on films is asked with as many frames as it was shown
    trained = shutil.copytree(folder, tmp_path / "trained")
    path = trained / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_frames": 1}))
    assert chat(capsys, trained, *ask, "--video", files[2]) == outputs[4]


def test_interactive_session(folder, files, capsys, monkeypatch):
    spaced = Path(files[0]).with_name("two words.png")
    spaced.write_bytes(Path(files[0]).read_bytes())
    lines = (
        f"/image {files[0]} '{spaced}'\nwhat?\n/image nowhere.png\n/clear\n/example {files[1]} what?::green\n"
        f"/example {files[1]} what?\n/video {files[2]}\n\nwhat?\n/quit\nnever\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(folder), "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("commands: /image PATH")
    assert (
        "words.png" not in captured.err and "two words.png (20 x 40); your next message has 2 pictures" in captured.out
    )
    assert "nowhere.png cannot be read as an image: there is no such file" in captured.err
    assert "write /example PATH QUESTION::ANSWER" in captured.err
    assert "Traceback" not in captured.err


def test_a_full_device_is_one_sentence(folder, capsys, monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    monkeypatch.setattr("otter_hf.serving.session.ChatSession.ask", run_out)
    assert main(["chat", str(folder), "--prompt", "what?"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("otter-hf: The device's memory is full (CUDA out of memory): take")


def test_ctrl_c_stops_an_answer_not_the_chat(folder, capsys, monkeypatch):
    from otter_hf.serving.session import ChatSession

    calls = []

    def ask(self, question, *args, **kwargs):
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "ask", ask)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", str(folder)]) == 0
    assert calls == ["one", "two"]
    assert "(stopped)" in capsys.readouterr().out


def test_generation_flags(folder, files, capsys):
    ask = ["--image", files[0], "--prompt", "what?", "--max-new-tokens", "16"]
    greedy = chat(capsys, folder, *ask)
    sampling = ["--temperature", "1.5", "--top-p", "0.95", "--top-k", "0"]
    sampled = [chat(capsys, folder, *ask, *sampling, "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    assert main(["chat", str(folder), *ask, "--top-p", "0.9"]) == 2
    assert "--top-p 0.9 is for sampling: give a --temperature above 0" in capsys.readouterr().err
    assert main(["chat", str(folder), *ask, "--stop", ""]) == 2
    assert "--stop '' is no text" in capsys.readouterr().err
    beams = chat(capsys, folder, *ask, "--num-beams", "3", "--no-repeat-ngram-size", "2", "--length-penalty", "-1")
    assert beams.startswith("> what?\n") and beams != greedy
    penalised = chat(capsys, folder, *ask, "--repetition-penalty", "5.0")
    assert penalised != greedy


def test_batch_of_questions(folder, files, tmp_path, capsys, monkeypatch):
    questions = tmp_path / "questions.yaml"
    questions.write_text(
        json.dumps(
            [
                {"image_path": files[0], "question": "what?"},
                {"image_path": "", "question": "what?"},
                {"image_path": [files[0], files[1]], "question": "what?"},
                {"video_path": files[2], "question": "what?"},
            ]
        )
    )
    arguments = ["--yaml-file", str(questions), "--output-dir", str(tmp_path / "logs")]
    read, open_image = [], batch.open_image
    monkeypatch.setattr(batch, "open_image", lambda *args: read.append(args) or open_image(*args))
    output = chat(capsys, folder, *arguments)
    assert len(read) == 3  # each picture once
    (log_file,) = (tmp_path / "logs").iterdir()
    assert log_file.match("inference_log_*.json") and f"wrote {log_file}" in output
    log = json.loads(log_file.read_text())
    assert (log["model_name"], log["checkpoint"]) == ("otter", str(folder))
    assert list(log["results"]) == ["000", "001", "002", "003"]
    assert log["results"]["000"].keys() == {"image_path", "question", "answer"}
    # an entry is a conversation of its own
    alone = chat(capsys, folder, "--prompt", "what?")
    assert log["results"]["001"]["answer"] == alone.removeprefix("> what?\n").strip()

    # interrupted after the first of two batches it goes on with the second
    asked = []
    generate = ConversationModel._generate

    def dying(self, batch, options):
        asked.append(len(batch.numbers))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(self, batch, options)

    monkeypatch.setattr(ConversationModel, "_generate", dying)
    arguments[-1] = str(tmp_path / "again")
    arguments += ["--batch-size", "2"]
    assert main(["chat", str(folder), "--max-new-tokens", "4", *arguments]) == 130
    chat(capsys, folder, *arguments)
    assert asked == [2, 2, 2]
    (again,) = (tmp_path / "again").iterdir()  # nothing else is left
    assert json.loads(again.read_text()) == log
    # what is drawn with a seed does not depend on where it was interrupted
    logs = []
    for name, deaths in (("whole", 0), ("broken", 1)):
        arguments[3] = str(tmp_path / name)
        asked[:] = [] if deaths else [0, 0]
        drawn = [*arguments, "--temperature", "2", "--seed", "3"]
        for _ in range(deaths):
            assert main(["chat", str(folder), "--max-new-tokens", "4", *drawn]) == 130
        chat(capsys, folder, *drawn)
        logs.append(json.loads(next((tmp_path / name).iterdir()).read_text())["results"])
    assert logs[0] == logs[1] != log["results"]
    # and the same question again is drawn again, in other batches too
    questions.write_text(json.dumps([{"question": "what?"}] * 10))
    asked[:] = [0, 0]
    drawn = [*arguments[:3], str(tmp_path / "same"), "--batch-size", "1", "--temperature", "2", "--seed", "3"]
    chat(capsys, folder, *drawn)
    (path,) = (tmp_path / "same").iterdir()
    assert len({result["answer"] for result in json.loads(path.read_text())["results"].values()}) > 8


def test_flamingo_without_a_template_continues_the_text(model, processor, folder, files, tmp_path, capsys):
    """OpenFlamingo's repositories have no chat template."""
    tokenizer = FlamingoProcessor.prepare_tokenizer(processor.tokenizer)
    FlamingoProcessor(processor.image_processor, tokenizer).save_pretrained(tmp_path / "flamingo")
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "answer_token_id")}
    torch.manual_seed(0)
    FlamingoForConditionalGeneration(FlamingoConfig(**settings)).save_pretrained(tmp_path / "flamingo")
    ask = ["--image", files[0], "--prompt", "Output:"]
    plain = chat(capsys, tmp_path / "flamingo", *ask)
    assert plain == chat(capsys, tmp_path / "flamingo", *ask, "--chat-template", "plain")
    assert plain != chat(capsys, tmp_path / "flamingo", *ask, "--chat-template", "simple")


def test_tokenizer_of_another_folder(model, processor, folder, files, tmp_path, capsys):
    """Repositories of 2023 often hold none."""
    model.save_pretrained(tmp_path / "bare")
    ask = ["--image", files[0], "--prompt", "what?"]
    assert main(["chat", str(tmp_path / "bare"), *ask]) == 2
    capsys.readouterr()
    assert chat(capsys, tmp_path / "bare", "--tokenizer", str(folder), *ask) == chat(capsys, folder, *ask)


def test_tokenizer_for_a_family_that_has_its_own(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fuyu"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["chat", str(tmp_path), "--tokenizer", str(tmp_path), "--prompt", "what?"]) == 2
    assert "is of type fuyu, which has its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "model './nowhere' is neither a folder here nor a Hub id"),
        (["FOLDER/config.json"], "config.json' is a file; give the folder"),
        (["FOLDER", "--image", "none.png"], "none.png cannot be read as an image"),
        (["FOLDER", "--video", "none.mp4"], "none.mp4 cannot be read as a video"),
        (["FOLDER", "--yaml-file", "none.yaml"], "none.yaml"),
        (["FOLDER", "--yaml-file", "none.yaml", "--controls"], "--controls belongs to a conversation"),
        (["FOLDER", "--yaml-file", "none.yaml", "--prompt", "x"], "--prompt belongs to a conversation"),
        (["FOLDER", "--chat-template", "none.jinja"], "none.jinja"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, folder, capsys):
    assert main(["chat", *(word.replace("FOLDER", str(folder)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("question: what?", "must hold a list of entries"),
        ("- image_path: a.png", "entry 0: give it a question in words"),
        ("- {question: what, imgae: a}", "unknown imgae; use image_path, video_path, question"),
        ("- question: what\n- {question: what, image_path: a.png}", "entry 1: there is no file a.png"),
    ],
)
def test_bad_questions_are_named(text, message, folder, tmp_path, capsys):
    (tmp_path / "questions.yaml").write_text(text)
    assert main(["chat", str(folder), "--yaml-file", str(tmp_path / "questions.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_4_bits_without_bitsandbytes_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr("otter_hf.models.quantization.is_bitsandbytes_available", lambda: False)
    assert main(["chat", str(folder), "--load-in-4bit"]) == 2
    assert "load_in_4bit needs bitsandbytes" in capsys.readouterr().err


def test_controls_say_whether_it_looked(model, folder, files, capsys):
    output = chat(capsys, folder, "--image", files[0], "--prompt", "what is it?", "--controls")
    _, answer, blank, other = output.splitlines()
    assert blank.startswith("with a blank picture: ") and other.startswith("with another picture: ")
    # a model whose gates are closed does not
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.zero_()
    model.save_pretrained(folder)
    _, answer, *controls = chat(capsys, folder, "--image", files[0], "--prompt", "a?", "--controls").splitlines()
    assert [line.split(": ", 1)[1] for line in controls] == [answer, answer]
