"""Pushing while training and at the end, to a Hub that drops connections and answers with errors."""

import json
import subprocess
import sys

import pytest
import torch
from hub_double import HubDouble
from huggingface_hub.utils import filter_repo_objects
from training_files import command, losses, weights, write_training_files

from otter_hf.training.publish import _STATE_FILES


# the Hub's client waits seconds between its tries
PROGRAM = """
import sys, time
from huggingface_hub.utils import _http
_http.time = type("Clock", (), {"sleep": staticmethod(lambda seconds: None), "time": time.time})
import torch
from otter_hf.training.run import run
from transformers import AutoModelForImageTextToText, AutoProcessor

for recipe in sys.argv[2:]:
    try:
        run([recipe])
    except ValueError as error:
        print("FAILED:", error)
model = AutoModelForImageTextToText.from_pretrained("tester/good")
AutoProcessor.from_pretrained("tester/good")
torch.save(model.state_dict(), sys.argv[1])
adapted = AutoModelForImageTextToText.from_pretrained("tester/adapters")
assert any("lora_B" in name and p.any() for name, p in adapted.named_parameters())
"""

PUSH = {
    "push_to_hub": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "max_steps": 6,
    "hub_always_push": True,  # each checkpoint waits for the push of the one before
}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub and the folder of three trainings: one pushed at last, one of adapters, one that could not be pushed."""
    folder = write_training_files(tmp_path_factory.mktemp("push"))
    good = {"hub_model_id": "tester/good", "hub_strategy": "checkpoint", "eval_mixture": str(folder / "eval.yaml")}
    good |= {"eval_strategy": "steps", "eval_steps": 3, "report_samples": 1}
    recipes = command(folder, "good", **PUSH | good)
    adapters = {"lora": True, "lora_r": 2, "lora_target_modules": ["q_proj"], "max_steps": 1, "hub_strategy": "end"}
    recipes += command(folder, "adapters", **PUSH | adapters | {"hub_model_id": "tester/adapters"})
    recipes += command(folder, "bad", **PUSH | {"hub_model_id": "tester/bad", "hub_strategy": "end", "max_steps": 1})
    with HubDouble() as hub:
        hub.fail("PUT", "/lfs/", None)  # a connection that drops once
        hub.fail("POST", "/objects/batch", 502)  # and a bad answer: the client tries again
        hub.fail("POST", "/good/commit/", 503, text="step 4")  # here it does not
        hub.fail("POST", "/bad/commit/", None)
        environment = hub.environment(folder / "hub_cache") | {
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder / "pulled.pt"), *recipes],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        yield hub, folder, result


def test_what_only_training_needs_is_not_beside_the_model():
    files = ["config.json", "files.json", "model.safetensors", "optimizer.pt", "pretraining_stream_0.json", "run.json"]
    assert [*filter_repo_objects(files, ignore_patterns=_STATE_FILES)] == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_training_survives_failed_pushes(pushed):
    hub, folder, result = pushed
    assert len(losses(folder / "good")) == 6
    titles = [title for _, title, _ in hub.repositories["tester/good"].commits]
    steps = [f"Training in progress, step {step}{part}" for step in (2, 6) for part in ("", ", checkpoint")]
    assert titles == ["initial commit", *steps, "End of training"]
    warnings = [line for line in result.stderr.splitlines() if "could not be pushed" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint-4 could not be pushed to tester/good (HfHubHTTPError: ")
    assert warnings[0].endswith("): training goes on, the next push takes all of it.")


def test_what_was_pushed(pushed):
    hub, folder, _ = pushed
    trained = weights(folder / "good")
    pulled = torch.load(folder / "pulled.pt", weights_only=True)
    assert all(torch.equal(tensor, pulled[name]) for name, tensor in trained.items())
    _, files = hub.repositories["tester/good"].at("main")
    root = {path for path in files if "/" not in path}
    assert root >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "processor_config.json"}
    assert root >= {"training.svg", "training.png", "training_report.html", "chat_template.jinja"}
    assert "optimizer.pt" not in root
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= files.keys()
    assert json.loads(files["last-checkpoint/trainer_state.json"].data)["global_step"] == 6
    # nor the lock, which names this machine
    assert not [path for path in files if path.startswith(("checkpoint-", "_unfinished", ".lock"))]


def test_card(pushed):
    hub, folder, _ = pushed
    _, files = hub.repositories["tester/good"].at("main")
    card = files["README.md"].data.decode()
    assert card.startswith("---\nlibrary_name: ") and "pipeline_tag" in card
    assert "IMAGE_TEXT  questions" in card  # the data mixture
    assert "| `learning_rate` | `0.01` |" in card
    assert "| `per_device_train_batch_size` | `4` |" in card
    assert "| loss | " in card and "| eval_loss | " in card
    assert "(training.svg)" in card and files["training.svg"].data.startswith(b"<svg")
    assert str(folder) not in card and "hf_test" not in card


def test_a_push_that_fails_at_the_end(pushed):
    hub, folder, result = pushed
    assert [title for _, title, _ in hub.repositories["tester/bad"].commits] == ["initial commit"]
    (message,) = [line for line in result.stdout.splitlines() if line.startswith("FAILED:")]
    assert f"is complete in {folder / 'bad'}, but could not be pushed to tester/bad (" in message
    assert f"hf upload tester/bad {folder / 'bad'} ." in message
    assert (folder / "bad" / "model.safetensors").is_file()


def test_adapters(pushed):
    hub, _, _ = pushed
    _, files = hub.repositories["tester/adapters"].at("main")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert "model.safetensors" not in files
    card = files["README.md"].data.decode()
    assert 'library_name: "peft"' in card and "| `lora_target_modules` | `['q_proj']` |" in card
