"""Reading the 2023 MPT configs."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, MptConfig

from otter_hf.models.mpt import OtterMptConfig


MOSAICML_MPT = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "expansion_ratio": 4,
    "max_seq_len": 256,
    "vocab_size": 448,
    "resid_pdrop": 0,
    "emb_pdrop": 0.1,
    "learned_pos_emb": True,
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8.0,
        "attn_impl": "triton",
        "attn_pdrop": 0.0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": 6,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": 1,
    },
    "init_config": {"name": "kaiming_normal_", "verbose": 0},
    "init_device": "cpu",
    "logit_scale": None,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "embedding_fraction": 1.0,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "verbose": 0,
}
MOSAIC_GPT = {
    "model_type": "mosaic_gpt",
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 256,
    "mlp_ratio": 2,
    "vocab_size": 448,
    "low_precision_layernorm": True,
    "softmax_scale": None,
}


def test_mosaicml_dialect():
    config = OtterMptConfig.from_legacy(MOSAICML_MPT)
    assert config.model_type == "otter_mpt" and config.tie_word_embeddings and config.use_cache
    assert (config.clip_qkv, config.softmax_scale, config.alibi_bias_max, config.emb_pdrop) == (6, 1, 8.0, 0.1)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 2)
    assert config.max_position_embeddings == 256
    assert MOSAICML_MPT["attn_config"]["clip_qkv"] == 6  # the input is left alone


def test_mosaic_gpt_dialect():
    config = OtterMptConfig.from_legacy(MOSAIC_GPT)
    assert config.qk_ln and config.clip_qkv is None and config.expansion_ratio == 2 and config.n_layers == 3


def test_transformers_dialect():
    theirs = MptConfig(d_model=64, n_heads=4, n_layers=2, attn_config={"clip_qkv": 3.0})
    config = OtterMptConfig.from_legacy(theirs.to_dict())
    assert config.clip_qkv == 3.0 and config.d_model == 64 and config.vocab_size == theirs.vocab_size


def test_saves_and_loads_through_auto_config(tmp_path):
    config = OtterMptConfig.from_legacy(MOSAICML_MPT)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, OtterMptConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert OtterMptConfig(hidden_size=96, num_attention_heads=3).d_model == 96


@pytest.mark.parametrize(
    "name, value",
    [("alibi", False), ("prefix_lm", True), ("attn_uses_sequence_id", True), ("attn_type", "multiquery_attention")],
)
def test_what_is_not_implemented_is_refused(name, value):
    nested = {**MOSAICML_MPT, "attn_config": {**MOSAICML_MPT["attn_config"], name: value}}
    for legacy in (nested, {**MOSAIC_GPT, name: value}):
        with pytest.raises(ValueError, match=f"{name}={value!r}, which is not implemented"):
            OtterMptConfig.from_legacy(legacy)


def test_impossible_shapes_are_refused():
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"d_model \(64\) must be a multiple of n_heads \(3\)"
    ):
        OtterMptConfig(d_model=64, n_heads=3)
    with pytest.raises(StrictDataclassClassValidationError, match="logit_scale is 'sqrt'"):
        OtterMptConfig(logit_scale="sqrt")


@pytest.mark.parametrize("folder", ["otter_mpt_image", "otter_mpt1b_redpajama", "flamingo_mpt", "otter_mpt_vis1024"])
def test_text_configs_of_the_original_code(folder, golden_case):
    legacy = json.loads((golden_case(f"otter/{folder}") / "config.json").read_text())["text_config"]
    config = OtterMptConfig.from_legacy(legacy)
    assert config.hidden_size == legacy["d_model"] and config.vocab_size == 448
    assert config.qk_ln is (folder == "otter_mpt1b_redpajama")
