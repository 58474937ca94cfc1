"""`otter-hf convert` and `otter-hf memory`, as a person types them."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MPT, save_model
from transformers import LlamaConfig

from otter_hf.cli import convert, memory
from otter_hf.conversion import estimate_memory, memory_table


SCRIPTS = Path(__file__).resolve().parents[2] / "conversion"


def run(module, *arguments) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


def test_dtype_and_export(tmp_path, capsys):
    model, _ = save_model(tmp_path / "model")
    command = ["convert", "dtype", "--source", tmp_path / "model", "--dtype", "bfloat16"]
    assert run(convert, *command, "--output", tmp_path / "half", "--verify") == 0
    printed = capsys.readouterr().out
    assert "0 unexplained; dtype bfloat16" in printed and "verified: the folder was loaded" in printed
    assert "the most likely token is the same at" in printed
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name].bfloat16()) for name, tensor in stored.items())
    command = ["convert", "export-legacy", "--source", tmp_path / "half", "--output", tmp_path / "2023"]
    assert run(convert, *command, "--language-model-name", "./llama-7b") == 0
    config = json.loads((tmp_path / "2023" / "config.json").read_text())
    assert config["text_config"]["_name_or_path"] == "./llama-7b"
    assert config["torch_dtype"] == "bfloat16"


def test_delta(tmp_path):
    save_model(tmp_path / "base")
    save_model(tmp_path / "tuned", seed=1)
    for action, other, output in (("make", "tuned", "delta"), ("apply", "delta", "again")):
        command = ["convert", "delta", action, "--base", tmp_path / "base", "--other", tmp_path / other]
        assert run(convert, *command, "--output", tmp_path / output) == 0
    again, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "tuned"))
    torch.testing.assert_close(again, tuned, atol=1e-6, rtol=0)


def test_openflamingo_as_in_the_readme(golden, tmp_path, capsys):
    case = golden / "otter" / "openflamingo_v2_pt_mpt"
    command = ["convert", "openflamingo", "--checkpoint", case / "checkpoint.pt", "--language-model", case / "llm"]
    command += ["--vision-tower", case / "clip", "--tokenizer", case / "tokenizer", "--output", tmp_path / "flamingo"]
    assert run(convert, *command) == 0
    assert "token <image>: 401" in capsys.readouterr().out
    command = ["convert", "flamingo-to-otter", "--source", tmp_path / "flamingo", "--output", tmp_path / "otter"]
    assert run(convert, *command) == 0
    assert "<answer>, the mean" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_every_script_has_its_command(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert leaving.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_there_is_a_script_for_every_command():
    assert {path.stem.replace("_", "-") for path in SCRIPTS.glob("*.py")} == set(convert._COMMANDS)


def test_a_script_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    missing, output = str(tmp_path / "nothing"), str(tmp_path / "output")
    monkeypatch.setattr(sys, "argv", ["dtype.py", "--source", missing, "--output", output])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(SCRIPTS / "dtype.py"), run_name="__main__")
    assert leaving.value.code == 2
    message = f"error: --source {missing!r} is neither a folder here nor a Hub id (owner/name).\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "output").exists()


class TestMemory:
    @pytest.mark.parametrize("text_config", [None, MPT], ids=["llama", "mpt"])
    def test_counts_are_those_of_the_model(self, tmp_path, text_config):
        model, _ = save_model(tmp_path / "model", **({"text_config": text_config} if text_config else {}))
        estimate = estimate_memory(model.config)
        assert estimate["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
        assert estimate["weights"]["float32"] == 4 * estimate["parameters"]["total"]
        assert estimate["weights"]["bfloat16"] == 2 * estimate["parameters"]["total"]
        assert estimate["weights"]["4-bit"] < estimate["weights"]["int8"] < estimate["weights"]["bfloat16"]

    def test_cache_is_that_of_the_model(self, tmp_path):
        model, _ = save_model(tmp_path / "model")
        estimate = estimate_memory(model.config)
        with torch.no_grad():
            input_ids = torch.tensor([[model.config.image_token_id, *range(1023)]]) % 259
            cache = model.model(
                input_ids=input_ids, pixel_values=torch.randn(1, 3, 28, 28), use_cache=True
            ).past_key_values
        text = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
        assert estimate["cache_per_1024_tokens"] == text
        media = sum(2 * value.numel() for value in cache.media_key_values.values())
        assert estimate["cache_per_image"] == media

    def test_command(self, tmp_path, capsys):
        model, _ = save_model(tmp_path / "model")
        assert run(memory, "memory", tmp_path / "model") == 0
        assert capsys.readouterr().out.strip() == memory_table(model.config)
        assert run(memory, "memory", tmp_path / "model" / "config.json", "--json") == 0
        assert json.loads(capsys.readouterr().out) == estimate_memory(model.config)

    def test_a_language_model_alone(self, tmp_path):
        LlamaConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a 'llama' model, which sees no pictures: name an Otter"):
            run(memory, "memory", tmp_path)

    def test_a_2023_configuration_needs_no_tokenizer(self, golden, tmp_path, capsys):
        config = (golden / "otter" / "otter_mpt_image" / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        assert run(memory, "memory", tmp_path / "config.json") == 0
        assert "gated cross-attention" in capsys.readouterr().out

    @pytest.mark.parametrize("values, told", [({"hidden_size": 35}, "not a multiple"), ({"hidden_act": "x"}, "'x'")])
    def test_values_of_no_use(self, tmp_path, values, told):
        save_model(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        config["text_config"] |= values
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        told = f"a value in its config.json is wrong: .*{told}"
        with pytest.raises(ValueError, match=told):
            run(memory, "memory", tmp_path / "model")
        command = ["convert", "dtype", "--source", tmp_path / "model", "--dtype", "bfloat16"]
        with pytest.raises(ValueError, match=told):
            run(convert, *command, "--output", tmp_path / "half")
        assert not (tmp_path / "half").exists()

    def test_no_configuration(self, tmp_path):
        with pytest.raises(ValueError, match="holds no config.json"):
            run(memory, "memory", tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
        with pytest.raises(ValueError, match="'unheard_of', which is unknown"):
            run(memory, "memory", tmp_path)
