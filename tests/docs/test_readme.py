"""The README's Python snippets run, in order, as a reader would paste them."""

import re
import shutil
from pathlib import Path


README = Path(__file__).resolve().parents[2] / "README.md"


def test_python_snippets_run(model, processor, tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert snippets
    monkeypatch.chdir(tmp_path)
    examples = "src/otter_hf/demo/examples"
    shutil.copytree(README.parent / examples, examples)
    # what `make demo` leaves behind, without its minutes
    model.save_pretrained("out/demo/model")
    processor.save_pretrained("out/demo/model")
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)
    assert "'pixel_values': (2, 2, 1, 3, 28, 28)" in capsys.readouterr().out
    assert len(namespace["answers"]) == 2


def test_makefile_has_the_commands_the_readme_names():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    commands = set(re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
