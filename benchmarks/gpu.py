"""Everything that only a card can tell: equal numbers, speed of decoding and training, memory, waits of the host.

    python benchmarks/gpu.py                               # on a CUDA card, under 8 minutes on an H100
    python benchmarks/gpu.py --only equal,host --seconds 120
    python benchmarks/gpu.py --scale tiny --device cpu     # the same code with small shapes

Nothing is downloaded: weights are random, at the shapes of the configurations in model_cards/facts.yaml. Needs torch,
transformers and this package; what else a row needs (PEFT, a flash attention) is named in the row if it is missing.
Rows are written as they come, so that a run that is cut short keeps what it had. A row that fails is a row with its
error, and the rest goes on.

    equal    fp32 and bf16 on the card against fp32 on the CPU; every attention implementation against eager, forward
             and backward, padded and packed; generation with and without a cache
    decode   ms per token at the shapes of OTTER-Image-MPT7B and -LLaMA7B, OtterHD-8B, and transformers' Idefics 9B
    train    steps of our recipes: real tokens per second, MFU, peak memory beside the plan; transformers' Fuyu
    host     synchronisations per decoding step and per training step
    compiled static caches, which transformers compiles on a card: ms per token, the same tokens; flex attention
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import _gpu_decode
import _gpu_equal
import _gpu_train
import torch
import transformers
from _gpu_models import Machine


RESULTS = Path(__file__).parent / "results"


def _compiled(machine: Machine) -> Iterator:
    yield from _gpu_decode.static_rows(machine)
    yield from _gpu_equal.compiled_rows(machine)


SECTIONS = {
    "equal": _gpu_equal.rows,
    "decode": _gpu_decode.rows,
    "train": _gpu_train.rows,
    "host": _gpu_decode.host_rows,
    "compiled": _compiled,
}


class Report:
    """The result file, complete on disk after each row."""

    def __init__(self, path: Path, machine: Machine):
        self.path = path
        self.result = {"name": "gpu", "scale": "tiny" if machine.tiny else "full", **describe(machine), "rows": []}
        self.write()

    def add(self, row: dict) -> None:
        self.result["rows"].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(self.path)


def describe(machine: Machine) -> dict:
    """Card, driver and versions."""
    card = driver = None
    if machine.on_card:
        properties = machine.cuda.get_device_properties(machine.device)
        card = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
        version = Path("/proc/driver/nvidia/version")
        driver = version.read_text().splitlines()[0] if version.is_file() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions["transformers"] = transformers.__version__
    return {
        "device": card["name"] if card else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "card": card,
        "driver": driver,
        "versions": versions,
    }


def measure(section: str, workload: str, function, machine: Machine) -> dict:
    """The row of a workload: what `function` returns, or its error."""
    start = time.perf_counter()
    try:
        row = function()
    except Exception as error:  # whatever a card or a kernel brings up; the rest goes on
        row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]}
    machine.free()
    return {"section": section, "workload": workload, **row, "took_seconds": round(time.perf_counter() - start, 2)}


def run(machine: Machine, only: list[str], seconds: float, section_seconds: float, report: Report) -> None:
    """The rows of some sections, until `seconds` are over; what there was no time for is named."""
    end = time.perf_counter() + seconds
    for section in only:
        section_end = end if machine.tiny else min(end, time.perf_counter() + section_seconds)
        for workload, function in SECTIONS[section](machine):
            if time.perf_counter() > section_end:
                report.add({"section": section, "workload": workload, "left_out": "out of time"})
            else:
                report.add(measure(section, workload, function, machine))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--seconds", type=float, default=450, help="begin no row after so many")
    parser.add_argument(
        "--section_seconds", type=float, default=100, help="begin no row of a section after so many of its own"
    )
    parser.add_argument("--output", type=Path, help="the result file; default: results/gpu_CARD.json")
    options = parser.parse_args(argv)
    only = options.only.split(",")
    unknown = sorted({*only} - {*SECTIONS})
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is no section, use some of {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA card here: add --scale tiny --device cpu to try the code.", file=sys.stderr)
        return 2
    if options.device == "cpu" and options.scale == "full":
        parser.error("--device cpu: the full shapes are for a card, add --scale tiny")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = Machine(torch.device(options.device), options.scale == "tiny")
    name = re.sub(r"\W+", "_", describe(machine)["card"]["name"].lower()) if machine.on_card else "cpu_tiny"
    report = Report(options.output or RESULTS / f"gpu_{name}.json", machine)
    run(machine, only, options.seconds, options.section_seconds, report)
    failed = [row for row in report.result["rows"] if "error" in row or row.get("equal") is False]
    print(f"{len(report.result['rows'])} rows, {len(failed)} of them failed: {report.path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
