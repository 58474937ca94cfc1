"""Folders of 2023 read through the Auto classes: dialects, token ids, LoRA, and what is missing in them."""

import json
import logging
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from hub_double import HubDouble, Repository, StoredFile
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from otter_hf import FlamingoProcessor, OtterConfig, OtterForConditionalGeneration, OtterModel, OtterProcessor
from otter_hf.models.legacy import name_lora_layers, upgrade_config_dict
from otter_hf.models.legacy_tokens import read_token_table
from otter_hf.testing.otter import build_tokenizer


# what transformers 4.35 put into every nested configuration
GENERATION_DEFAULTS = {"max_length": 20, "top_k": 50, "bad_words_ids": None, "num_beams": 1}
LLAMA = {
    "_name_or_path": "luodian/llama-7b-hf",
    "model_type": "llama",
    "architectures": None,
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    **GENERATION_DEFAULTS,
}
MPT = {
    "_name_or_path": "",
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "vocab_size": 270,
    "d_model": 32,
    "hidden_size": 32,
    "n_heads": 2,
    "n_layers": 2,
    "attn_config": {"alibi": True, "attn_impl": "torch", "attn_pdrop": 0, "qk_ln": False, "alibi_bias_max": 8},
    "init_config": {"name": "kaiming_normal_"},
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    **GENERATION_DEFAULTS,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "torch_dtype": "float16",
}


def legacy_config(text_config=LLAMA, model_type="otter", **fields) -> dict:
    return {
        "model_type": model_type,
        "architectures": ["FlamingoForConditionalGeneration"],
        "cross_attn_every_n_layers": 1,
        "text_config": text_config,
        "vision_config": VISION,
        "torch_dtype": "float32",
        "use_media_placement_augmentation": True,
        "only_attend_previous": True,
        "transformers_version": None,
        "_commit_hash": None,
        **fields,
    }


@pytest.fixture
def otter_tokenizer():
    return OtterProcessor.prepare_tokenizer(build_tokenizer())


@pytest.fixture
def legacy_folder(tmp_path, otter_tokenizer):
    """A 2023 Otter folder with random weights in one pickled file."""
    (tmp_path / "config.json").write_text(json.dumps(legacy_config()))
    otter_tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = OtterForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    names = {"model.language_model.": "lang_encoder.model.", "model.perceiver.": "perceiver."}
    names |= {"model.vision_tower.": "vision_encoder.vision_model.", "lm_head.": "lang_encoder.lm_head."}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        state_dict[new + name.removeprefix(old)] = tensor.clone()
    # stored by transformers up to 4.31, computed today
    state_dict["lang_encoder.model.layers.0.decoder_layer.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    state_dict["vision_encoder.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(state_dict, tmp_path / "pytorch_model.bin")
    return tmp_path, model


def remove_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


class TestAutoClasses:
    def test_every_class_reads_the_folder(self, legacy_folder, caplog):
        folder, original = legacy_folder
        with caplog.at_level(logging.WARNING):
            model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert not caplog.records
        assert type(model) is OtterForConditionalGeneration
        assert type(AutoModel.from_pretrained(folder)) is OtterModel
        assert type(AutoConfig.from_pretrained(folder)) is OtterConfig
        assert type(AutoProcessor.from_pretrained(folder)) is OtterProcessor
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    def test_the_file_itself_or_a_folder_inside_another(self, legacy_folder):
        folder, original = legacy_folder
        within = {"pretrained_model_name_or_path": folder.parent, "subfolder": folder.name}
        for config in (
            AutoConfig.from_pretrained(folder / "config.json"),
            OtterConfig.from_pretrained(folder / "config.json"),
            OtterConfig.from_pretrained(**within),
            OtterForConditionalGeneration.from_pretrained(**within).config,
        ):
            assert config.image_token_id == original.config.image_token_id

    def test_saved_and_read_again_it_is_the_same(self, legacy_folder, tmp_path_factory):
        folder, original = legacy_folder
        new = tmp_path_factory.mktemp("saved")
        first = AutoModelForImageTextToText.from_pretrained(folder)
        first.save_pretrained(new)
        AutoProcessor.from_pretrained(folder).save_pretrained(new)
        model = AutoModelForImageTextToText.from_pretrained(new)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in original.state_dict().items())
        config, expected = model.config.to_dict(), first.config.to_dict()
        assert config.pop("_name_or_path") != expected.pop("_name_or_path")
        assert config == expected
        processor = AutoProcessor.from_pretrained(new)
        assert processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()

    def test_half_precision_copy(self, legacy_folder):
        folder, _ = legacy_folder
        state_dict = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save({name: tensor.half() for name, tensor in state_dict.items()}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(legacy_config(torch_dtype="float16")))
        assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.float16

    def test_pickled_code_does_not_run(self, legacy_folder, tmp_path):
        folder, _ = legacy_folder

        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"perceiver.latents": Payload()}, folder / "pytorch_model.bin")
        with pytest.raises((pickle.UnpicklingError, ValueError, OSError)):
            AutoModelForImageTextToText.from_pretrained(folder)
        assert not (tmp_path / "ran").exists()

    def test_weights_missing(self, legacy_folder):
        folder, _ = legacy_folder
        (folder / "pytorch_model.bin").unlink()
        with pytest.raises(OSError, match="safetensors"):
            AutoModelForImageTextToText.from_pretrained(folder)


class TestTokenIds:
    def test_ids_and_size_come_from_the_tokenizer(self, legacy_folder, otter_tokenizer):
        folder, _ = legacy_folder
        config = AutoConfig.from_pretrained(folder)
        vocabulary = otter_tokenizer.get_vocab()
        assert config.image_token_id == vocabulary["<image>"]
        assert config.end_of_chunk_token_id == vocabulary["<|endofchunk|>"]
        assert config.answer_token_id == vocabulary["<answer>"]
        assert config.pad_token_id == vocabulary["<PAD>"]
        assert config.tokenizer_vocab_size == len(otter_tokenizer)
        assert config.eos_token_id == [2, vocabulary["<|endofchunk|>"]]

    def test_generation_stops_at_the_end_of_an_answer(self, legacy_folder):
        folder, _ = legacy_folder
        # a file of that time: never written by a person
        generation = {"_from_model_config": True, "eos_token_id": 2, "max_length": 20, "use_cache": False}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.generation_config.eos_token_id == model.config.eos_token_id
        assert model.generation_config.pad_token_id == model.config.pad_token_id
        assert model.generation_config.use_cache is True
        assert model.generation_config.max_length != 20

    def test_a_generation_config_that_somebody_wrote_is_kept(self, legacy_folder):
        folder, _ = legacy_folder
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_new_tokens": 3}))
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (7, 3)

    def test_rows_above_the_tokenizer_are_never_generated(self, legacy_folder):
        folder, _ = legacy_folder
        model = AutoModelForImageTextToText.from_pretrained(folder)
        size = model.config.tokenizer_vocab_size
        assert size < model.config.text_config.vocab_size
        with torch.no_grad():
            model.lm_head.weight[size:] = 100 * model.lm_head.weight[size:]
        inputs = {"input_ids": torch.arange(10)[None], "max_new_tokens": 12, "eos_token_id": -1, "do_sample": False}
        assert model.generate(**inputs).max() < size
        model.config.tokenizer_vocab_size = None
        assert model.generate(**inputs).max() >= size

    def test_no_tokenizer_is_one_sentence_that_names_the_base(self, legacy_folder):
        folder, _ = legacy_folder
        remove_tokenizer(folder)
        for auto_class in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
            with pytest.raises(OSError, match="tokenizer=.*luodian/llama-7b-hf"):
                auto_class.from_pretrained(folder)

    @pytest.mark.parametrize("prepared", [False, True])
    def test_tokenizer_given(self, legacy_folder, tmp_path_factory, otter_tokenizer, prepared):
        folder, _ = legacy_folder
        expected = AutoConfig.from_pretrained(folder)
        remove_tokenizer(folder)
        tokenizer_folder = tmp_path_factory.mktemp("tokenizer")
        (otter_tokenizer if prepared else build_tokenizer()).save_pretrained(tokenizer_folder)
        for tokenizer in (str(tokenizer_folder), otter_tokenizer if prepared else build_tokenizer()):
            config = AutoModelForImageTextToText.from_pretrained(folder, tokenizer=tokenizer).config
            assert config.image_token_id == expected.image_token_id
            assert config.answer_token_id == expected.answer_token_id
            assert config.pad_token_id == expected.pad_token_id
            assert config.tokenizer_vocab_size == expected.tokenizer_vocab_size
            processor = AutoProcessor.from_pretrained(folder, tokenizer=tokenizer)
            assert processor.tokenizer.get_vocab() == otter_tokenizer.get_vocab()

    def test_the_tokenizer_of_another_model(self, legacy_folder):
        """LLaMA's, given for an MPT: all of its ids are there."""
        folder, _ = legacy_folder
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["vocab_size"] = 3 * len(build_tokenizer()) // 2
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="The tokenizer has .* rows: it is not the one"):
            AutoConfig.from_pretrained(folder)

    def test_answer_above_pad_is_explained(self, tmp_path, caplog):
        tokenizer = OtterProcessor.prepare_tokenizer(FlamingoProcessor.prepare_tokenizer(build_tokenizer()))
        vocabulary = tokenizer.get_vocab()
        assert vocabulary["<PAD>"] < vocabulary["<answer>"]
        tokenizer.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            config = upgrade_config_dict(legacy_config(), tmp_path)
        assert config["answer_token_id"] == vocabulary["<answer>"]
        assert config["pad_token_id"] == vocabulary["<PAD>"]
        assert "would have swapped" in caplog.text

    def test_flamingo_gets_no_answer_token(self):
        ids = read_token_table(build_tokenizer(), "flamingo").ids
        assert "<answer>" not in ids
        assert ids["<PAD>"] == ids["<image>"] + 1 == ids["<|endofchunk|>"] + 2

    def test_image_token_outside_the_vocabulary(self, otter_tokenizer):
        config = upgrade_config_dict(legacy_config(LLAMA | {"vocab_size": 256}), None, otter_tokenizer)
        with pytest.raises(ValueError, match="image_token_id is .* vocabulary of 256 rows"):
            OtterConfig(**config)


class TestDialects:
    def read(self, tokenizer, config) -> OtterConfig:
        return AutoConfig.for_model(**upgrade_config_dict(config, None, tokenizer))

    def test_written_by_the_training_script(self, otter_tokenizer):
        config = legacy_config(architectures="OtterForConditionalGeneration", special_tokens=["<answer>"])
        config = self.read(otter_tokenizer, config | {"train_full_model": True})
        assert not hasattr(config, "special_tokens")
        assert not hasattr(config, "train_full_model")

    def test_llama_known_by_its_name_only(self, otter_tokenizer):
        text_config = {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")}
        assert self.read(otter_tokenizer, legacy_config(text_config)).text_config.model_type == "llama"

    def test_model_type_from_the_architecture(self, otter_tokenizer):
        text_config = {key: value for key, value in MPT.items() if key != "model_type"}
        assert self.read(otter_tokenizer, legacy_config(text_config)).text_config.model_type == "otter_mpt"

    def test_unknown_language_model(self, otter_tokenizer):
        with pytest.raises(ValueError, match="model_type"):
            upgrade_config_dict(legacy_config({"hidden_size": 8}), None, otter_tokenizer)

    def test_mpt(self, otter_tokenizer):
        config = self.read(otter_tokenizer, legacy_config(MPT))
        assert config.text_config.model_type == "otter_mpt"
        assert config.text_config.num_hidden_layers == 2
        assert config.tie_word_embeddings

    def test_mosaic_gpt(self, otter_tokenizer):
        text_config = {key: value for key, value in MPT.items() if key not in ("attn_config", "init_config")}
        text_config |= {"model_type": "mosaic_gpt", "architectures": ["MosaicGPT"]}
        text_config |= {"attn_qk_ln": True, "attn_clip_qkv": None, "mlp_ratio": 4, "alibi": True, "alibi_bias_max": 8}
        config = self.read(otter_tokenizer, legacy_config(text_config))
        assert config.text_config.model_type == "otter_mpt"
        assert config.text_config.qk_ln

    def test_refined_web(self, otter_tokenizer):
        text_config = {"model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "n_layer": 2, "n_head": 4}
        text_config |= {"hidden_size": 32, "vocab_size": 270, "multi_query": True, "parallel_attn": True}
        config = self.read(otter_tokenizer, legacy_config(text_config, "flamingo"))
        assert config.text_config.model_type == "falcon"
        assert (config.text_config.num_hidden_layers, config.text_config.num_attention_heads) == (2, 4)
        assert config.tie_word_embeddings

    def test_tying_is_that_of_the_language_model(self, otter_tokenizer):
        assert not self.read(otter_tokenizer, legacy_config()).tie_word_embeddings
        assert not self.read(otter_tokenizer, legacy_config(tie_word_embeddings=True)).tie_word_embeddings
        tied = legacy_config(LLAMA | {"tie_word_embeddings": True}, tie_word_embeddings=False)
        assert self.read(otter_tokenizer, tied).tie_word_embeddings

    def test_video(self, otter_tokenizer):
        assert self.read(otter_tokenizer, legacy_config(max_num_frames=16)).max_num_frames == 16

    def test_number_format_of_the_parts_is_ignored(self, otter_tokenizer):
        config = self.read(otter_tokenizer, legacy_config())
        assert config.dtype == torch.float32
        assert config.text_config.dtype is None and config.vision_config.dtype is None

    def test_a_configuration_of_today_is_untouched(self):
        config = OtterConfig().to_dict()
        assert upgrade_config_dict(config, "nowhere") is config


class TestLora:
    @pytest.mark.parametrize("base_layer", ["", "base_layer."])
    def test_names_of_all_peft_versions(self, base_layer):
        prefix = "lang_encoder.base_model.model.transformer.blocks.0.decoder_layer."
        state_dict = {
            f"{prefix}attn.Wqkv.{base_layer}weight": 0,
            f"{prefix}attn.Wqkv.{base_layer}bias": 1,
            f"{prefix}attn.Wqkv.lora_A.default.weight": 2,
            f"{prefix}attn.Wqkv.lora_B.default.weight": 3,
            f"{prefix}attn.out_proj.weight": 4,
            "perceiver.latents": 5,
        }
        ours = "lang_encoder.transformer.blocks.0.decoder_layer."
        assert name_lora_layers(state_dict, {"target_modules": ["Wqkv"]}) == {
            f"{ours}attn.Wqkv.base_layer.weight": 0,
            f"{ours}attn.Wqkv.base_layer.bias": 1,
            f"{ours}attn.Wqkv.lora_A.default.weight": 2,
            f"{ours}attn.Wqkv.lora_B.default.weight": 3,
            f"{ours}attn.out_proj.weight": 4,
            "perceiver.latents": 5,
        }

    @pytest.fixture
    def lora_folder(self, legacy_folder):
        """The legacy folder with LoRA factors of rank 2 on q_proj and v_proj, and the same model with them merged."""
        folder, original = legacy_folder
        stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
        state_dict = {key.replace("lang_encoder.", "lang_encoder.base_model.model."): v for key, v in stored.items()}
        for layer in range(original.config.text_config.num_hidden_layers):
            for name in ("q_proj", "v_proj"):
                key = f"layers.{layer}.decoder_layer.self_attn.{name}"
                a, b = torch.randn(2, 32), torch.randn(32, 2)
                state_dict[f"lang_encoder.base_model.model.model.{key}.lora_A.default.weight"] = a
                state_dict[f"lang_encoder.base_model.model.model.{key}.lora_B.default.weight"] = b
                original.get_parameter(f"model.language_model.{key}.weight").data += 2 * b @ a
        torch.save(state_dict, folder / "pytorch_model.bin")
        lora = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.05}
        (folder / "config.json").write_text(json.dumps(legacy_config(lora_config=lora)))
        return folder, original

    def test_factors_stay_layers_of_their_own(self, lora_folder, tmp_path):
        folder, merged = lora_folder
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())
        input_ids = torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits
            torch.testing.assert_close(logits, merged(input_ids=input_ids).logits, atol=1e-5, rtol=1e-4)

        model.save_pretrained(tmp_path / "saved")
        again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values())
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_a_new_model_starts_without_an_update(self, lora_folder):
        folder, _ = lora_folder
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        updates = [tensor for name, tensor in model.named_parameters() if ".lora_B." in name]
        assert updates and not any(tensor.any() for tensor in updates)

    def test_a_configuration_without_factors(self, legacy_folder):
        folder, _ = legacy_folder
        (folder / "config.json").write_text(json.dumps(legacy_config(lora_config={"r": 2, "lora_alpha": 4})))
        with pytest.raises(ValueError, match="hold no LoRA factors: remove lora_config"):
            AutoModelForImageTextToText.from_pretrained(folder)

    def test_factors_of_other_layers(self, lora_folder):
        folder, _ = lora_folder
        lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "config.json").write_text(json.dumps(legacy_config(lora_config=lora)))
        with pytest.raises(ValueError, match=r"LoRA factors of \['q_proj', 'v_proj'\]: write these"):
            AutoModelForImageTextToText.from_pretrained(folder)


def test_golden_processors_know_their_tokens(golden_case):
    cases = [path.parent for path in sorted(golden_case("otter").glob("*/config.json"))]
    assert cases
    for case in cases:
        facts = json.loads((case / "golden.json").read_text())
        processor = AutoProcessor.from_pretrained(case)
        assert processor.image_token_id == facts["special_ids"]["media"]
        assert processor.tokenizer.pad_token_id == facts["special_ids"]["pad"]
        config = AutoConfig.from_pretrained(case)
        assert config.tokenizer_vocab_size == len(processor.tokenizer)
        assert processor.image_processor.crop_size["height"] == config.vision_config.image_size


def test_golden_folder_without_tokenizer(golden, tmp_path):
    folder = shutil.copytree(golden / "otter" / "otter_mpt_image", tmp_path / "copy")
    remove_tokenizer(folder)
    with pytest.raises(OSError, match="gpt-neox-20b"):
        AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = golden / "otter" / "_tokenizers" / "neox"
    config = AutoModelForImageTextToText.from_pretrained(folder, tokenizer=tokenizer).config
    expected = AutoConfig.from_pretrained(golden / "otter" / "otter_mpt_image")
    assert config.image_token_id == expected.image_token_id
    assert config.pad_token_id == expected.pad_token_id


READ_REVISIONS = """
import sys
from otter_hf import OtterConfig, OtterForConditionalGeneration
repository, cache_dir, *revisions = sys.argv[1:]
for revision in revisions:
    location = {"revision": revision, "cache_dir": cache_dir, "token": "hf_test"}
    config = OtterConfig.from_pretrained(repository, **location)
    model = OtterForConditionalGeneration.from_pretrained(repository, **location)
    assert model.config.image_token_id == config.image_token_id
    print(config.image_token_id, config.tokenizer_vocab_size)
"""


@pytest.mark.slow
def test_token_ids_are_those_of_the_revision_asked_for(legacy_folder, otter_tokenizer, tmp_path_factory):
    """A private repository, known to the arguments of `from_pretrained` alone, whose tokenizer was replaced later."""
    folder, _ = legacy_folder
    other = build_tokenizer()
    other.add_tokens(["otters"])  # all special tokens come one later
    with HubDouble() as hub:
        repository = hub.repositories["tester/legacy"] = Repository("tester/legacy", private=True)
        revisions = []
        for tokenizer in (otter_tokenizer, OtterProcessor.prepare_tokenizer(other)):
            tokenizer.save_pretrained(folder)
            files = {file.name: StoredFile(file.read_bytes()) for file in folder.iterdir()}
            revisions.append(repository.commit(files, "tokenizer"))
        environment = hub.environment(tmp_path_factory.mktemp("home"))
        del environment["HF_TOKEN"]
        command = [sys.executable, "-c", READ_REVISIONS, repository.name, str(tmp_path_factory.mktemp("cache"))]
        result = subprocess.run([*command, *revisions], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    image, size = otter_tokenizer.convert_tokens_to_ids("<image>"), len(otter_tokenizer)
    assert result.stdout.splitlines() == [f"{image} {size}", f"{image + 1} {size + 1}"]
