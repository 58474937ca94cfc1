"""Conversions write down the token ids of 2023, and export-legacy files that hold them."""

import json
from pathlib import Path

import pytest
from tiny_models import LLAMA, VISION
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from otter_hf.conversion import export_legacy, finish, plan_flamingo_to_otter, plan_folder, plan_inject_lm
from otter_hf.conversion.job import open_tokenizer


DATA = Path(__file__).parents[1] / "models" / "tokens_2023"
IDS = {reference: json.loads((DATA / f"ids_{reference}.json").read_text()) for reference in ("4.28", "4.35")}
TEXTS, SIZE = IDS["4.28"]["texts"], IDS["4.28"]["llama_size"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaMA of spring 2023 (no tokenizer.json, no add_bos_token, no legacy) and a CLIP tower, random weights."""
    folder = tmp_path_factory.mktemp("base")
    fields = {name: value for name, value in LLAMA.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**fields, vocab_size=SIZE)).save_pretrained(folder / "llama")
    (folder / "llama" / "tokenizer.model").write_bytes((DATA / "llama" / "tokenizer.model").read_bytes())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "llama" / "tokenizer_config.json").write_text(json.dumps(names))
    vision = {name: value for name, value in VISION.items() if name != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    return folder


def ids_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("reference", IDS)
def test_every_conversion_writes_the_ids_of_2023(base, tmp_path, reference):
    options = {"tokenizer_reference": reference}
    expected = IDS[reference]["no_map"]["ids"]
    every = {"cross_attn_every_n_layers": 2}
    finish(plan_inject_lm(base / "llama", base / "clip", model_type="otter", **every, **options), tmp_path / "otter")
    assert ids_of(AutoTokenizer.from_pretrained(tmp_path / "otter")) == expected
    # back to 2023, where a folder does not say which version it was made with, and to today again
    export_legacy(tmp_path / "otter", tmp_path / "2023")
    assert not (tmp_path / "2023" / "tokenizer.json").exists()
    tokenizer = plan_folder(tmp_path / "2023", **options).processor.tokenizer
    assert ids_of(tokenizer) == IDS[reference]["class_only"]["ids"]

    flamingo = plan_inject_lm(base / "llama", base / "clip", **every, **options)
    finish(flamingo, tmp_path / "flamingo")
    tokenizer = plan_flamingo_to_otter(tmp_path / "flamingo").processor.tokenizer
    # <answer> got the id behind <PAD>
    swapped = {SIZE + 2: SIZE + 3, SIZE + 3: SIZE + 2}
    assert ids_of(tokenizer) == [[swapped.get(token_id, token_id) for token_id in row] for row in expected]


@pytest.mark.parametrize("reference", IDS)
def test_the_tokenizer_of_an_openflamingo_checkpoint(base, reference):
    tokenizer = open_tokenizer(base / "llama", legacy=True, reference=reference)
    plain = [index for index, text in enumerate(TEXTS) if "<" not in text]
    rows = ids_of(tokenizer)
    assert plain and all(rows[index] == IDS[reference]["no_map"]["ids"][index] for index in plain)
