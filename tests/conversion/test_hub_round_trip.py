"""A model pushed to a Hub from one process and pulled in another: bit-equal, with processor and card."""

import json
import subprocess
import sys

import pytest
import torch
from hub_double import HubDouble
from tiny_models import save_model


def run(hub, cache, program: str, *arguments):
    """Run a program in a process that takes the double for the Hub."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, env=hub.environment(cache), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def hub():
    with HubDouble() as hub:
        yield hub


PULL = """
import json, sys, torch
import otter_hf
from transformers import AutoModelForImageTextToText, AutoProcessor
repository, output = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(repository, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(repository)
torch.save(model.state_dict(), output)
print(json.dumps([processor.tokenizer.get_vocab(), processor.chat_template, model.generation_config.eos_token_id]))
"""


@pytest.mark.slow
def test_converted_folder(hub, tmp_path):
    model, processor = save_model(tmp_path / "model")
    push = "import sys; from otter_hf.cli.convert import main; sys.exit(main('dtype'))"
    options = ("--source", tmp_path / "model", "--output", tmp_path / "output", "--push-to-hub", "converted")
    run(hub, tmp_path / "cache_a", push, *options)
    stored = json.loads(run(hub, tmp_path / "cache_b", PULL, "tester/converted", tmp_path / "pulled.pt"))
    pulled = torch.load(tmp_path / "pulled.pt", weights_only=True)
    assert pulled.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in pulled.items())
    assert stored[:2] == [processor.tokenizer.get_vocab(), processor.chat_template]
    _, files = hub.repositories["tester/converted"].at("main")
    card = files["README.md"].data.decode()
    assert "library_name" in card and "`<answer>`" in card
    assert files["model.safetensors"].sha256
    report = json.loads(files["conversion_report.json"].data)
    assert report["files"][0]["sha256"] == files["model.safetensors"].sha256


@pytest.mark.slow
def test_push_to_hub_of_model_and_processor(hub, tmp_path):
    model, processor = save_model(tmp_path / "model")
    push = """
import sys
import otter_hf
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained(sys.argv[1]).push_to_hub("tester/pushed", max_shard_size="200KB")
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("tester/pushed")
"""
    run(hub, tmp_path / "cache_a", push, tmp_path / "model")
    vocabulary, template, _ = json.loads(run(hub, tmp_path / "cache_b", PULL, "tester/pushed", tmp_path / "pulled.pt"))
    pulled = torch.load(tmp_path / "pulled.pt", weights_only=True)
    assert all(torch.equal(tensor, pulled[name]) for name, tensor in model.state_dict().items())
    assert (vocabulary, template) == (processor.tokenizer.get_vocab(), processor.chat_template)
    # today's names, whatever the model was loaded from
    _, files = hub.repositories["tester/pushed"].at("main")
    index = json.loads(files["model.safetensors.index.json"].data)
    assert set(index["weight_map"]) == set(model.state_dict())


@pytest.mark.slow
def test_2023_repository(hub, golden, tmp_path):
    """A repository as it lies on the Hub since 2023 is read in one line, and a second time without any network."""
    folder = golden / "otter" / "otter_llama_image"
    upload = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/otter-2023")
HfApi().upload_folder(repo_id="tester/otter-2023", folder_path=sys.argv[1], ignore_patterns=["golden*"])
"""
    run(hub, tmp_path / "cache_a", upload, folder)
    run(hub, tmp_path / "cache_b", PULL, "tester/otter-2023", tmp_path / "pulled.pt")
    offline = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n" + PULL
    asked = len(hub.requests)
    run(hub, tmp_path / "cache_b", offline, "tester/otter-2023", tmp_path / "again.pt")
    assert len(hub.requests) == asked
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("pulled.pt", "again.pt"))
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert torch.equal(first["lm_head.weight"], stored["lang_encoder.lm_head.weight"])
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_what_a_conversion_reads_is_downloaded(hub, tmp_path):
    """Weights in one of their two forms, none of what is named for its tokenizer, and OpenFlamingo's checkpoint."""
    save_model(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (tmp_path / "model" / "checkpoint.pt").write_bytes(b"trained")
    upload = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/both")
HfApi().upload_folder(repo_id="tester/both", folder_path=sys.argv[1])
"""
    run(hub, tmp_path / "cache_a", upload, tmp_path / "model")
    resolve = """
import sys
from otter_hf.conversion.job import resolve_checkpoint, resolve_folder
names = [sorted(path.name for path in resolve_folder("tester/both", weights=weights).iterdir()) for weights in (0, 1)]
print(*("weights" if "model.safetensors" in found else "none" for found in names))
assert not any("pytorch_model.bin" in found or "checkpoint.pt" in found for found in names)
assert resolve_checkpoint("tester/both@main").read_bytes() == b"trained"
"""
    assert run(hub, tmp_path / "cache_b", resolve).split() == ["none", "weights"]
