"""The kit for a GPU, on the CPU with small shapes, and with a card that is made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu as kit  # noqa: E402
from _gpu_models import Machine  # noqa: E402


# what a machine with a card that is at hand for minutes has not
ABSENT = ["av", "datasets", "matplotlib", "pandas", "pyarrow", "sentencepiece", "torchvision"]


def test_every_section_on_a_cpu(tmp_path):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu"
    )
    arguments = ["--scale", "tiny", "--device", "cpu", "--seconds", "1e6", "--output", str(tmp_path / "gpu.json")]
    subprocess.run(
        [sys.executable, "-c", f"{code}; import gpu; sys.exit(gpu.main({arguments}))"], check=True, cwd=tmp_path
    )
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["rows"]
    assert {row["section"] for row in rows} == {*kit.SECTIONS} and len(rows) > 50
    assert not [row for row in rows if "error" in row or row.get("equal") is False]
    reasons = {row["left_out"] for row in rows if "left_out" in row}
    assert "needs CUDA" in reasons and "out of time" not in reasons
    assert len([row for row in rows if row.get("equal")]) == 20
    waits = {row["workload"]: row for row in rows if row["section"] == "host"}
    for family in ("otter-llama", "otter-mpt", "flamingo", "otterhd"):
        assert waits[f"{family}: waits in a decoding step"]["ours"] == 0
    for row in rows:
        if row["section"] in ("decode", "train") and "left_out" not in row and "profile" not in row["workload"]:
            assert row.get("ours", row.get("peer")) > 0
        if row["section"] == "train" and "mfu" in row:
            assert row["mfu"] > 0 and row["planned_bytes"] > 1e6
    assert result["card"] is None and result["scale"] == "tiny"


def test_without_a_card_it_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kit.main([]) == 2
    assert capsys.readouterr().err == ("There is no CUDA card here: add --scale tiny --device cpu to try the code.\n")


def test_a_row_that_fails_and_one_without_time(tmp_path, monkeypatch, capsys):
    def rows(machine):
        yield "breaks", lambda: 1 / 0
        yield "works", lambda: {"ours": 1}

    monkeypatch.setattr(kit, "SECTIONS", {"equal": rows, "host": rows})
    arguments = ["--scale", "tiny", "--device", "cpu", "--output", str(tmp_path / "a.json"), "--only", "equal"]
    assert kit.main(arguments) == 1
    first, second = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert first["error"] == "ZeroDivisionError: division by zero" and second["ours"] == 1
    assert kit.main([*arguments, "--seconds", "0"]) == 0
    assert {row["left_out"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]} == {"out of time"}
    with pytest.raises(SystemExit):
        kit.main([*arguments[:-1], "speed"])
    assert "speed is no section, use some of equal, host" in capsys.readouterr().err


class Card:
    """What the kit asks of `torch.cuda`, with a clock that goes 5 ms per event."""

    clock, peak, calls = 0, 7, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Card.clock += 5
            self.at = Card.clock

        def elapsed_time(self, end):
            return end.at - self.at

    @classmethod
    def synchronize(cls):
        cls.calls.append("synchronize")

    @classmethod
    def reset_peak_memory_stats(cls):
        cls.calls.append("reset")

    @classmethod
    def max_memory_allocated(cls):
        return cls.peak

    @staticmethod
    def empty_cache():
        pass

    @staticmethod
    def get_device_properties(device):
        return type("Properties", (), {"name": "Card", "total_memory": 80, "major": 9, "minor": 0})


def test_time_and_memory_on_a_card(tmp_path):
    machine = Machine(torch.device("cuda"), tiny=False, cuda=Card)
    ran = []
    assert machine.seconds(lambda: ran.append(1), repeats=3) == 0.005
    assert len(ran) == 4  # one to warm up
    Card.calls.clear()
    assert machine.peak_bytes(lambda: Card.calls.append("step")) == 7
    assert Card.calls == ["synchronize", "reset", "step", "synchronize"]
    report = kit.Report(tmp_path / "card.json", machine)
    assert report.result["card"] == {"name": "Card", "memory_bytes": 80, "capability": "9.0"}
    report.add({"section": "host", "ours": 0})  # on disk at once
    assert json.loads((tmp_path / "card.json").read_text())["rows"] == [{"section": "host", "ours": 0}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_equal_numbers_and_no_waits_on_a_card(tmp_path):
    assert kit.main(["--only", "equal,host", "--output", str(tmp_path / "gpu.json")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert all(row["ours"] <= row["goal"] for row in rows if row["section"] == "host" and "ours" in row)
