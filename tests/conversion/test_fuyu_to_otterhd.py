"""Fuyu folders of 2023 to OtterHD folders of today."""

import argparse
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, FuyuForCausalLM

from otter_hf import OtterHDForConditionalGeneration, OtterHDProcessor
from otter_hf.cli import convert
from otter_hf.conversion import ConversionError, convert_fuyu
from otter_hf.testing.otterhd import tiny_model, tiny_processor


def make_folder_of_2023(folder, first_revision: bool):
    """A folder with the names of one of the two Hub revisions, a `.bin`, and no RoPE base in `text_config`."""
    processor = tiny_processor()
    model = tiny_model(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    decoder, head = ("model.", "lm_head") if first_revision else ("language_model.model.", "language_model.lm_head")
    weights = {f"{decoder}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", decoder).replace("lm_head", head)
        weights[name.replace("model.vision_embed_tokens", "vision_embed_tokens")] = tensor
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    del text["rope_parameters"]
    config |= {key: text[key] for key in ("hidden_size", "vocab_size")} | {"rope_theta": 25000.0}
    config["text_config"] = text
    (folder / "config.json").write_text(json.dumps(config))
    return model, processor


def inputs_of(processor):
    return processor(text="User: Who? Assistant:", images=Image.new("RGB", (35, 24), "red"))


@pytest.mark.parametrize("first_revision", [False, True])
def test_folders_of_2023(tmp_path, first_revision):
    model, processor = make_folder_of_2023(tmp_path / "fuyu", first_revision)
    report = convert_fuyu(tmp_path / "fuyu", tmp_path / "otterhd", verify=True)
    assert report.verification["max_logit_difference"] <= 1e-5
    assert report.notes == ["RoPE base 25000 is now stated in text_config, where the source had none"]
    assert list(report.unused.values()) == ["recomputed by today's code"]
    assert report.token_table["<0x04>"] == processor.answer_token_id
    names = load_file(tmp_path / "otterhd" / "model.safetensors").keys()
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} < names
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_embed_tokens"}

    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "otterhd").eval()
    assert isinstance(converted, OtterHDForConditionalGeneration)
    again = AutoProcessor.from_pretrained(tmp_path / "otterhd")
    assert isinstance(again, OtterHDProcessor)
    # plain transformers reads it right as well
    plain = FuyuForCausalLM.from_pretrained(tmp_path / "otterhd").eval()
    inputs = inputs_of(again)
    with torch.no_grad():
        expected = model(**inputs_of(processor)).logits
        torch.testing.assert_close(converted(**inputs).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert converted.generation_config.eos_token_id == processor.end_of_text_id
    assert "User:{question} Assistant:" in (tmp_path / "otterhd" / "README.md").read_text()


def test_command(tmp_path, capsys):
    make_folder_of_2023(tmp_path / "fuyu", False)
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    command = ["convert", "fuyu-to-otterhd", "--source", str(tmp_path / "fuyu"), "--dtype", "bfloat16"]
    args = parser.parse_args([*command, "--max-shard-size", "0.00005", "--output", str(tmp_path / "half")])
    assert args.func(args) == 0
    assert "0 unexplained; dtype bfloat16" in capsys.readouterr().out
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert (tmp_path / "half" / "model.safetensors.index.json").is_file()


def test_mistakes_leave_nothing_behind(tmp_path):
    fuyu = tmp_path / "fuyu"
    make_folder_of_2023(fuyu, False)
    weights = torch.load(fuyu / "pytorch_model.bin")
    torch.save(weights | {"surplus": torch.ones(1)}, fuyu / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="surplus has no place in the result"):
        convert_fuyu(fuyu, tmp_path / "out")
    (fuyu / "tokenizer.json").rename(fuyu / "gone.json")
    with pytest.raises(ConversionError, match="The tokenizer or image processor in .* cannot be read"):
        convert_fuyu(fuyu, tmp_path / "out")
    config = json.loads((fuyu / "config.json").read_text())
    (fuyu / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ConversionError, match="has the model type 'llama'; expected 'fuyu'"):
        convert_fuyu(fuyu, tmp_path / "out")
    assert not (tmp_path / "out").exists()
