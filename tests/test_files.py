"""Files and folders are replaced whole or not at all; one process at a time works at a place; a full disk is told."""

import errno
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from otter_hf.cli import main
from otter_hf.files import claim, disk_full_told, is_disk_full, move, replacing, write_json, write_text


def test_a_file_or_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    write_text(path, "second \ud800\n")
    assert path.read_text() == "second ?\n"
    with pytest.raises(KeyError), replacing(path) as written:
        written.write_text("half")
        raise KeyError
    assert path.read_text() == "second ?\n" and list(path.parent.iterdir()) == [path]

    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with replacing(folder) as written:
            (written / "inner").mkdir(parents=True)
            (written / "inner" / "file").write_text(content)
        assert (folder / "inner" / "file").read_text() == content
    # a folder in the place of a file
    with replacing(path) as written:
        written.mkdir()
    assert path.is_dir()
    names = ["file", "folder", "inner", "new", "result.json"]
    assert sorted(item.name for item in tmp_path.rglob("*")) == names


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"1")
    with pytest.raises(IsADirectoryError, match="mine is a folder, and would be replaced by a file"):
        write_text(tmp_path / "mine", "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "photo.jpg"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A loss of power behind the renaming must not leave an empty file under the name."""
    events, names = [], {}
    replace, fsync, opened = os.replace, os.fsync, os.open

    def note_open(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        names[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(names[descriptor]), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "weights").write_text("1")
    move(tmp_path / "part", tmp_path / "whole")
    assert events == ["weights", "part", "renamed", tmp_path.name]


def test_what_several_write_is_whole(tmp_path):
    """Threads that write one file at a time, as those that cache features do."""
    errors = []

    def write():
        try:
            with replacing(tmp_path / "file", shared=True) as written:
                written.write_text("x" * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and (tmp_path / "file").read_text() == "x" * 1000 and len(list(tmp_path.iterdir())) == 1


OWNER = """
import os, sys, time

from otter_hf.files import claim

with claim(sys.argv[1], "here"):
    if os.fork() == 0:  # as a data worker, it lives on for a moment
        time.sleep(0.3)
        os._exit(0)
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_claim(tmp_path):
    """It names its owner, may be nested, and goes when its owner is killed, though a child of it lives on."""
    lock = tmp_path / "folder" / ".lock"
    with claim(lock, "here", nested=True), claim(lock, "here", nested=True):
        assert lock.exists()
        assert "here is in use by process" in claim_error(lock)
        refused = []
        thread = threading.Thread(target=lambda: refused.append(claim_error(lock)))
        thread.start()
        thread.join()
        assert f"here is in use by process {os.getpid()} on " in refused[0] and " since 2" in refused[0]
    assert not lock.exists()

    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "claimed\n"
    assert f"in use by process {process.pid} on " in claim_error(lock)
    process.kill()
    process.wait()
    with claim(lock, "here"):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    process.stdin.close()
    process.stdout.close()


def claim_error(lock):
    try:
        with claim(lock, "here"):
            return ""
    except OSError as error:
        return str(error)


def test_a_claim_whose_owner_cannot_be_written(tmp_path, monkeypatch):
    """Windows writes nothing where a lock is."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("otter_hf.files.json", SimpleNamespace(dumps=refuse, loads=json.loads))
    with claim(tmp_path / "lock", "here"):
        assert "is in use by another process" in claim_error(tmp_path / "lock")


def test_an_unreadable_owner_is_another_process(tmp_path):
    from filelock import FileLock

    for content in ("", "[]", '{"process": -1}', '{"process": "a"}'):
        with FileLock(tmp_path / "lock"):
            (tmp_path / "lock").write_text(content)
            assert "is in use by another process: wait" in claim_error(tmp_path / "lock")


def test_a_claim_holds_behind_an_evaluation(tmp_path, monkeypatch):
    """lmms-eval lets every lock of a path in that is in the same process."""
    evaluator = pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed")
    api = pytest.importorskip("filelock._api")
    monkeypatch.setattr(api.FileLockMeta, "__call__", api.FileLockMeta.__call__)  # which is as it was, afterwards
    monkeypatch.setattr(evaluator._enable_reentrant_filelocks, "_patched", False, raising=False)
    evaluator._enable_reentrant_filelocks()
    with claim(tmp_path / "lock", "here"):
        assert "is in use by process" in claim_error(tmp_path / "lock")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("No space left on device (os error 28)"),  # tokenizers
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
    ],
)
def test_a_full_disk_is_told_in_one_sentence(tmp_path, error):
    """Whatever library meets it; what was there stays."""
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="make room, and run it again") as told, replacing(path) as written:
        written.write_text("half")
        raise error
    assert told.value.filename == str(path) and is_disk_full(told.value)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="no such thing"), disk_full_told(path):
        raise ValueError("no such thing")


def test_errors_that_led_to_one_another_end():
    """As where the last attempt's error is raised from that of a library that gave up."""
    first, second = ValueError("of a row"), RuntimeError("gave up")
    first.__cause__, second.__cause__ = second, first
    assert not is_disk_full(first)


def test_the_command_on_a_full_disk(tmp_path, monkeypatch, capsys):
    def fill(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source, output = tmp_path / "X_instructions.json", tmp_path / "X_train.json"
    source.write_text(json.dumps({"data": {"a": {"instruction": "Q", "answer": "A", "rel_ins_ids": []}}}))
    monkeypatch.setattr("otter_hf.files.sync", fill)
    assert main(["data", "make-train-config", str(source), "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("otter-hf: No space left on device") and str(output) in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def write_train_config_to(path):
    from otter_hf.data.tools import write_train_config

    source = path.with_name("X_instructions.json")
    source.write_text(json.dumps({"data": {"a": {"instruction": "Q", "answer": "A", "rel_ins_ids": []}}}))
    write_train_config(source, path)


def write_hub_form_to(path):
    from otter_hf.data.hub import write_hub_form

    write_hub_form([], path)


def write_invalid_to(path):
    from otter_hf.production.syphus.build import InvalidFile

    with InvalidFile(path):
        pass


def write_model_to(path):
    from otter_hf.conversion.writer import output_folder

    with output_folder(path):
        pass


def test_two_that_answer_into_one_folder(tmp_path):
    """The first to end would delete what the other keeps."""
    from otter_hf.serving.batch import kept_replies

    with kept_replies(tmp_path, "a") as replies:
        with pytest.raises(OSError, match="is in use by process .*: wait"), kept_replies(tmp_path, "b"):
            pass
        replies.add({"key": "reply"})
        assert "reply" in (tmp_path / "replies" / "replies-0.jsonl").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_train_config_to, write_hub_form_to, write_invalid_to, write_model_to])
def test_what_another_is_writing_is_left_to_it(tmp_path, write):
    """The second would delete what the first has begun."""
    begun = tmp_path / ".output.incomplete"
    begun.write_text("half")
    with claim(tmp_path / ".output.lock", "it"), pytest.raises(OSError, match="output is in use by process .*: wait"):
        write(tmp_path / "output")
    assert begun.read_text() == "half"
    write(tmp_path / "output")
    assert not begun.exists() and (tmp_path / "output").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_printed(tmp_path, monkeypatch, capsys):
    source, reading, writing = tmp_path / "X_instructions.json", *os.pipe()
    source.write_text(json.dumps({"data": {"a": {"instruction": "Q", "answer": "A", "rel_ins_ids": []}}}))
    command = ["data", "make-train-config", str(source), "--output", str(tmp_path / "X_train.json")]
    os.close(reading)
    for place, status, told in (("/dev/full", 2, "No space left on device"), (writing, 141, "")):
        with open(place, "w") as output, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", output)
            assert main(command) == status
            output.flush()  # as Python does at its end
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == bool(told)
