"""Files of 2023 and of transformers 5, read with the right RoPE base."""

import json

import pytest
from transformers import AutoConfig, FuyuConfig
from transformers.utils import logging

from otter_hf.models.otterhd import OtterHDConfig


# adept/fuyu-8b as OtterHD was trained from it, made small; the real files leave the sizes to the defaults
FLAT = {
    "model_type": "fuyu",
    "architectures": ["FuyuForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 99,
    "eos_token_id": 71013,
    "bos_token_id": 1,
    "partial_rotary_factor": 0.5,
    "patch_size": 10,
    "rope_scaling": None,
    "rope_theta": 25000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.2",
}


def read(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return AutoConfig.from_pretrained(tmp_path)


def base(config):
    return config.text_config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("text_config", [None, {"model_type": "persimmon"}, {"hidden_size": 64, "vocab_size": 99}])
def test_2023_files(tmp_path, text_config):
    content = FLAT if text_config is None else FLAT | {"text_config": text_config}
    config = read(tmp_path, content)
    assert type(config) is OtterHDConfig
    assert base(config) == 25000
    assert config.text_config.rope_parameters["partial_rotary_factor"] == 0.5
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (64, 99)
    assert config.eos_token_id == config.text_config.eos_token_id == 71013


def test_text_config_wins_over_the_top_level(tmp_path):
    config = read(tmp_path, FLAT | {"text_config": {"vocab_size": 77, "rope_theta": 10000.0}})
    assert config.text_config.vocab_size == 77
    assert base(config) == 10000


def test_base_without_any_mention(tmp_path):
    content = {key: value for key, value in FLAT.items() if key != "rope_theta"}
    assert base(read(tmp_path, content)) == 25000
    assert base(OtterHDConfig()) == 25000


def test_a_fuyu_of_transformers_5_is_not_changed(tmp_path):
    fuyu = FuyuConfig(text_config={"model_type": "persimmon", "hidden_size": 64, "num_hidden_layers": 1})
    assert base(fuyu) == 10000  # what transformers 5 trains a new Fuyu with
    fuyu.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.to_dict() == fuyu.text_config.to_dict()


def test_saved_configuration_is_right_for_plain_fuyu(tmp_path):
    config = read(tmp_path, FLAT | {"text_config": {"model_type": "persimmon"}})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert base(FuyuConfig.from_pretrained(tmp_path)) == 25000


def test_repair_is_reported(tmp_path, caplog):
    # a base of its own, because each warning is given once
    logging.enable_propagation()
    try:
        read(tmp_path, FLAT | {"text_config": {}, "rope_theta": 31415.0})
    finally:
        logging.disable_propagation()
    assert "31415" in caplog.text
