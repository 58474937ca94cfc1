"""README and docs in an empty shell, literally; where a demo was trained (`make demo`, OTTER_DEMO) with its model."""

import os
import re
from pathlib import Path

import pytest
from walk import ROOT, Shell, blocks_of, clone, transcript, walk


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if any(blocks_of(path)))]
PAGE = """```bash
echo a
```

```python
x = 1
print(x)
```

```shell
false
```

```python
print(x + 1)
```
"""


def test_a_shell_tells_the_first_failure_and_keeps_its_state(tmp_path):
    shell = Shell(tmp_path, tmp_path / "home")
    try:
        assert shell.run("word=kept\nsleep 600 &\n")[0] == 0
        status, _, output = shell.run("echo $word $HOME\n(exit 3)\ntrue\n")
        assert (status, output) == (3, f"kept {tmp_path}/home\n")
    finally:
        shell.close()


def test_python_blocks_are_one_session(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    shell = Shell(tmp_path, tmp_path / "home")
    try:
        shell.run("shopt -s expand_aliases; alias python=python3")
        blocks = list(walk(page, shell))
    finally:
        shell.close()
    assert [(block.status, block.output) for block in blocks] == [(0, "a\n"), (0, "1\n"), (0, "2\n")]
    text = transcript(blocks, 1.0, Path("m"), str(tmp_path))
    assert "## 1. page.md: exit code 0" in text and "3 blocks, 3 with exit code 0" in text and "earlier run" in text


@pytest.mark.slow
def test_the_transcript_is_of_the_blocks_of_the_readme():
    text = (ROOT / "docs" / "transcript.md").read_text(encoding="utf-8")
    shown = re.split(r"^## \d+\. README.md: exit code ", text, flags=re.MULTILINE)[1:]
    blocks = list(blocks_of(ROOT / "README.md"))
    assert len(shown) == len(blocks)
    for section, block in zip(shown, blocks, strict=True):
        assert section.startswith("0, ") and f"\n{block.text.rstrip()}\n" in section, "run tests/docs/walk.py again"


@pytest.mark.slow
def test_every_page_runs_from_an_empty_shell(tmp_path):
    trained = Path(os.environ.get("OTTER_DEMO") or ROOT / "out" / "demo" / "model").resolve()
    folder = clone(tmp_path / "otter-hf")
    failed = []
    for page in PAGES:
        shell = Shell(folder, tmp_path / "home")
        try:
            if page != "README.md":
                shell.run("source .venv/bin/activate")
            for block in walk(folder / page, shell, trained if trained.exists() else None):
                if block.status:
                    failed.append(f"{page}: {block.text}\n{block.output[-2000:]}")
        finally:
            shell.close()
    assert not failed, "\n\n".join(failed)
