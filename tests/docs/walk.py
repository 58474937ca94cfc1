"""
Runs the documentation as a reader would: a fresh clone, an empty shell, and every block of a page in its order.

    python tests/docs/walk.py --demo out/demo/model --output docs/transcript.md README.md

Blocks marked `bash` and `python` run as they stand, `shell` and `py` are for the reader's own files. The Python blocks
of a page are one session, its shell blocks another. With `--demo` the model folder of an earlier `make demo` is put
where `make demo` would train it; its environment is made all the same.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# what a reader's shell has of ours: how to reach package indexes
PASSED_ON = re.compile(r"PIP_\w+|\w*_proxy|\w*_PROXY|\w*CERT\w*|\w*_CA_\w+|OMP_NUM_THREADS|HF_HUB_OFFLINE")
_TAIL = 8


@dataclass
class Block:
    """A block of a page, and how it ended: `status` 0 if none of its commands failed."""

    page: str
    language: str
    text: str
    status: int | None = None
    seconds: float = 0.0
    output: str = ""


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page that run as they stand."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield Block(page.name, language, block)


class Shell:
    """A bash with nothing of ours in it, in which blocks run one after the other."""

    def __init__(self, folder: Path, home: Path):
        home.mkdir(exist_ok=True)
        own = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        path = f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        self.home, self.count = home, 0
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._send("set -m; trap 'status=$?' ERR")

    def run(self, text: str) -> tuple[int, float, str]:
        """Exit status (of the last command that failed), seconds, and output with errors."""
        self.count += 1
        script, log = self.home / f"block-{self.count}.sh", self.home / f"block-{self.count}.txt"
        script.write_text(text, encoding="utf-8")
        started = time.monotonic()
        self._send(f"status=0; source {script} </dev/null >{log} 2>&1; echo done $status")
        for line in self.process.stdout:
            if line.startswith("done "):
                return int(line.split()[1]), time.monotonic() - started, log.read_text("utf-8", "replace")
        return 1, time.monotonic() - started, log.read_text("utf-8", "replace") + "\n(the shell ended)"

    def close(self) -> None:
        """Ends the shell, and what it left in the background."""
        self._send("trap - ERR; kill $(jobs -p) 2>/dev/null; wait")
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _send(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()


def walk(page: Path, shell: Shell, demo: Path | None = None) -> Iterator[Block]:
    """Runs the blocks of a page; `make demo` gives way to its environment and the folder `demo`, if that is given."""
    instead = f"make .venv/.demo && mkdir -p out/demo && cp -r {demo} out/demo/model"
    session = shell.home / f"{page.name}.py"
    before = ""
    for block in blocks_of(page):
        text = block.text if demo is None else re.sub(r"^make demo\b", instead, block.text)
        if block.language == "python":
            # what earlier blocks print was seen then
            quiet = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    exec({before!r})\n"
            session.write_text((quiet if before else "") + block.text, encoding="utf-8")
            before, text = before + block.text, f"python {session}"
        block.status, block.seconds, block.output = shell.run(text)
        yield block


def clone(folder: Path) -> Path:
    """A clone of what is committed."""
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(folder)], check=True)
    return folder


def transcript(blocks: list[Block], cloned: float, demo: Path | None, home: str) -> str:
    """The page."""
    total = cloned + sum(block.seconds for block in blocks)
    trained = "`make demo` trained its model in this run."
    if demo is not None:
        trained = (
            "The model of `make demo` was trained in an earlier run and put where this one would: `make demo` made "
            "its environment only, which is what its seconds are; [the training's own](demo_metrics.json)."
        )
    lines = [
        "# Transcript: the README in a fresh shell",
        "",
        f"Written by `python tests/docs/walk.py` on {date.today()}: a clone ({cloned:.0f} s), a shell without any "
        f"environment, each block as it stands, with Python {sys.version.split()[0]} on Linux, {os.cpu_count()} CPUs "
        f"shared with other work. {len(blocks)} blocks, {sum(not block.status for block in blocks)} with exit code 0, "
        f"{total:.0f} s. {trained} Of longer outputs the last lines are shown.",
        "",
    ]
    for number, block in enumerate(blocks, start=1):
        lines += [f"## {number}. {block.page}: exit code {block.status}, {block.seconds:.1f} s", ""]
        lines += [f"```{'shell' if block.language == 'bash' else 'py'}", block.text.rstrip(), "```", ""]
        # without bars of progress, which are drawn over one another
        shown = [line.rstrip()[:160] for line in block.output.replace(home, "~").splitlines()]
        shown = [line for line in shown if line and not re.search(r"\d+%\||\d+ \w+ \[\d\d:\d\d", line)]
        if shown:
            cut = ["..."] if len(shown) > _TAIL else []
            lines += ["```text", *cut, *shown[-_TAIL:], "```", ""]
    return "\n".join(lines)


def main() -> int:
    """Status 1 if a block failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", help="as from the root of the repository")
    parser.add_argument("--demo", type=Path, help="model folder of an earlier `make demo`")
    parser.add_argument("--output", type=Path, help="write the transcript there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        started = time.monotonic()
        folder = clone(Path(temporary, "otter-hf"))
        cloned, blocks = time.monotonic() - started, []
        shell = Shell(folder, Path(temporary, "home"))
        for page in arguments.pages:
            for block in walk(folder / page, shell, arguments.demo and arguments.demo.resolve()):
                print(f"{block.page}: {block.status}, {block.seconds:.1f} s\n{block.text}", flush=True)
                if block.status:
                    print(block.output[-3000:], flush=True)
                blocks.append(block)
        shell.close()
        shutil.rmtree(folder)
        if arguments.output:
            text = transcript(blocks, cloned, arguments.demo, temporary)
            arguments.output.write_text(text, encoding="utf-8")
    return int(any(block.status for block in blocks))


if __name__ == "__main__":
    sys.exit(main())
