"""OpenFlamingo checkpoints with their language models and towers -> Flamingo; fresh Flamingos."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from otter_hf.conversion import ConversionError, finish, plan_folder, plan_inject_lm, plan_openflamingo
from otter_hf.conversion.tensors import open_checkpoint
from otter_hf.testing.otter import build_tokenizer


CASES = {
    "openflamingo_v1_pt": "llm",
    "openflamingo_v2_pt_mpt": "llm",
    "openflamingo_v2_pt_neox": "llm",
    "openflamingo_v2_pt_mosaicgpt": "mpt-1b-redpajama-200b-dolly",
}


@pytest.fixture(scope="module", params=CASES)
def converted(request, golden, tmp_path_factory):
    folder = golden / "otter" / request.param
    output = tmp_path_factory.mktemp("converted") / request.param
    job = plan_openflamingo(
        folder / "checkpoint.pt", folder / CASES[request.param], folder / "clip", folder / "tokenizer"
    )
    report = finish(job, output)
    # what the original code computed with
    attention = {"": "eager", "text_config": "eager", "vision_config": "sdpa"}
    model, info = AutoModelForImageTextToText.from_pretrained(
        output, output_loading_info=True, attn_implementation=attention
    )
    assert not any(info.values()), info
    facts = json.loads((folder / "golden.json").read_text())
    return model, load_file(folder / "golden.safetensors"), facts, report, output


def stores_no_head(facts) -> bool:
    """Whether the language model has a head of its own that the checkpoint lacks."""
    return facts.get("output_embeddings_untied", False) and not facts["output_head_in_checkpoint"]


class TestGolden:
    def test_logits_and_loss(self, converted):
        model, tensors, facts, *_ = converted
        mask = tensors["attention_mask"]
        # v1 never stored the output rows of its new tokens
        with torch.no_grad():
            if stores_no_head(facts):
                model.lm_head.weight[facts["base_vocab_rows"] :] = tensors["lm_head_new_rows"]
            output = model(
                input_ids=tensors["lang_x"],
                pixel_values=tensors["vision_x"],
                attention_mask=mask,
                labels=tensors["labels"],
            )
        torch.testing.assert_close(output.logits[mask == 1], tensors["logits"][mask == 1], atol=1e-4, rtol=0)
        assert output.loss.item() == pytest.approx(facts["loss"], abs=1e-5)

    def test_greedy_tokens(self, converted):
        model, tensors, *_ = converted
        rows = [name.split(".")[1] for name in tensors if name.startswith("gen_truth.")]
        assert rows
        for row in rows:
            prompt, truth = tensors[f"gen_lang_x.{row}"], tensors[f"gen_truth.{row}"]
            output = model.generate(
                input_ids=prompt,
                pixel_values=tensors["vision_x"][int(row) : int(row) + 1],
                max_new_tokens=truth.shape[1],
                do_sample=False,
                eos_token_id=-1,
            )
            assert output[:, prompt.shape[1] :].tolist() == truth.tolist()

    def test_every_tensor_is_accounted_for(self, converted):
        model, _, facts, report, output = converted
        assert not report.unexplained and not report.missing
        saved = json.loads((output / "conversion_report.json").read_text())
        stored = saved["tensors"].keys() | saved["unused"].keys()
        assert {f"checkpoint.pt: {key}" for key in facts["checkpoint_keys"]} <= stored
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert set(saved["tensors"].values()) == set(model.state_dict()) - tied
        assert all(len(file["sha256"]) == 64 for files in saved["sources"].values() for file in files)

    def test_tokens_and_gates(self, converted):
        model, _, facts, report, output = converted
        assert model.config.cross_attn_every_n_layers == facts["cross_attn_every_n_layers"]
        ids = facts["special_ids"]
        assert report.token_table == {"<|endofchunk|>": ids["eoc"], "<image>": ids["media"], "<PAD>": ids["pad"]}
        processor = AutoProcessor.from_pretrained(output)
        assert processor.image_token_id == ids["media"]
        assert model.generation_config.eos_token_id[-1] == ids["eoc"]

    def test_v1_rows_without_weights_are_reported(self, converted):
        _, _, facts, report, _ = converted
        initialised = [name for name in report.initialised if name.startswith("lm_head")]
        assert bool(initialised) == stores_no_head(facts)


@pytest.mark.parametrize(
    "wrap", [lambda x: {"model_state_dict": {f"module.{k}": v for k, v in x.items()}}, lambda x: {"model": x}]
)
def test_wrapped_checkpoints(golden, tmp_path, wrap):
    folder = golden / "otter" / "openflamingo_v2_pt_mpt"
    torch.save(wrap(torch.load(folder / "checkpoint.pt", weights_only=True)), tmp_path / "checkpoint.pt")
    expected = open_checkpoint(folder / "checkpoint.pt")
    found = open_checkpoint(tmp_path / "checkpoint.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].load(), expected[name].load()) for name in found)


def test_open_clip_file_instead_of_a_clip_folder(golden, tmp_path):
    folder = golden / "otter" / "openflamingo_v1_pt"
    arguments = (folder / "checkpoint.pt", folder / "llm")
    finish(plan_openflamingo(*arguments, folder / "clip", folder / "tokenizer"), tmp_path / "clip")
    job = plan_openflamingo(*arguments, folder / "open_clip_visual.pt", folder / "tokenizer", open_clip_head_dim=16)
    report = finish(job, tmp_path / "open_clip")
    assert report.unused["open_clip_visual.pt: proj"] == "no part of the vision tower"
    expected = load_file(tmp_path / "clip" / "model.safetensors")
    found = load_file(tmp_path / "open_clip" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("clip", "open_clip")]
    clip, open_clip = (config["vision_config"] for config in configs)
    for field in ("hidden_act", "hidden_size", "image_size", "num_attention_heads", "num_hidden_layers", "patch_size"):
        assert clip[field] == open_clip[field], field


class TestWrongSources:
    @pytest.fixture
    def convert(self, golden, tmp_path):
        case = golden / "otter" / "openflamingo_v2_pt_mpt"
        parts = {"checkpoint": case / "checkpoint.pt", "language_model": case / "llm"}
        parts |= {"vision_tower": case / "clip", "tokenizer": case / "tokenizer"}

        def run(output=tmp_path / "output", **replaced):
            try:
                finish(plan_openflamingo(**{**parts, **replaced}), output)
            finally:
                assert not output.exists() and not list(tmp_path.glob(".output*"))

        return run

    def test_another_language_model(self, convert, golden):
        other = golden / "otter" / "openflamingo_v2_pt_mosaicgpt" / "mpt-1b-redpajama-200b-dolly"
        with pytest.raises(ConversionError, match="gated layers at .* language model of 3 layers"):
            convert(language_model=other)

    def test_language_model_of_another_size(self, convert, tmp_path):
        config = LlamaConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, vocab_size=403
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        with pytest.raises(ConversionError, match="do not belong together|has no place"):
            convert(language_model=tmp_path / "llama")

    def test_missing_clip(self, convert, tmp_path):
        with pytest.raises(ConversionError, match="neither a folder here"):
            convert(vision_tower=tmp_path / "nothing")

    def test_folder_with_config_only(self, convert, golden, tmp_path):
        (tmp_path / "clip").mkdir()
        config = (golden / "otter" / "openflamingo_v2_pt_mpt" / "clip" / "config.json").read_text()
        (tmp_path / "clip" / "config.json").write_text(config)
        with pytest.raises(ConversionError, match="holds no weights"):
            convert(vision_tower=tmp_path / "clip")

    def test_no_tokenizer(self, convert):
        with pytest.raises(ConversionError, match="--tokenizer"):
            convert(tokenizer=None)

    def test_tokenizer_of_another_model(self, convert, tmp_path):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([f"word{i}" for i in range(200)])
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(ConversionError, match="403 embedding rows, .* --tokenizer"):
            convert(tokenizer=tmp_path / "tokenizer")

    def test_extra_weights(self, convert, golden, tmp_path):
        state_dict = torch.load(golden / "otter" / "openflamingo_v2_pt_mpt" / "checkpoint.pt", weights_only=True)
        torch.save(state_dict | {"surprise.weight": torch.zeros(2)}, tmp_path / "checkpoint.pt")
        with pytest.raises(ConversionError, match="surprise.weight has no place .* --allow"):
            convert(checkpoint=tmp_path / "checkpoint.pt")

    def test_extra_weights_allowed(self, golden, tmp_path):
        case = golden / "otter" / "openflamingo_v2_pt_mpt"
        state_dict = torch.load(case / "checkpoint.pt", weights_only=True)
        torch.save(state_dict | {"surprise.weight": torch.zeros(2)}, tmp_path / "checkpoint.pt")
        job = plan_openflamingo(tmp_path / "checkpoint.pt", case / "llm", case / "clip", case / "tokenizer")
        report = finish(job, tmp_path / "output", allow=True)
        assert len(report.unexplained) == 1

    def test_truncated_checkpoint(self, convert, golden, tmp_path):
        content = (golden / "otter" / "openflamingo_v2_pt_mpt" / "checkpoint.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
        with pytest.raises(ConversionError, match="damaged"):
            convert(checkpoint=tmp_path / "checkpoint.pt")

    def test_no_openflamingo_checkpoint(self, convert, tmp_path):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "checkpoint.pt")
        with pytest.raises(ConversionError, match="is no OpenFlamingo checkpoint"):
            convert(checkpoint=tmp_path / "checkpoint.pt")


@pytest.fixture
def parts(tmp_path):
    """A language model with a tokenizer, and a vision tower, as two folders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=258
    )
    language_model = LlamaForCausalLM(config).eval()
    language_model.save_pretrained(tmp_path / "language_model")
    build_tokenizer().save_pretrained(tmp_path / "language_model")
    vision = {"hidden_size": 32, "image_size": 28, "intermediate_size": 64, "num_attention_heads": 2}
    vision |= {"num_hidden_layers": 1, "patch_size": 14}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "clip")
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(tmp_path / "siglip")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "two_towers")
    return tmp_path, language_model


class TestInjectLm:
    @pytest.mark.parametrize("tower", ["clip", "siglip", "two_towers"])
    @pytest.mark.parametrize("model_type", ["flamingo", "otter"])
    def test_answers_as_the_language_model_before_training(self, parts, tower, model_type):
        folder, language_model = parts
        job = plan_inject_lm(
            folder / "language_model",
            folder / tower,
            model_type=model_type,
            cross_attn_every_n_layers=2,
            perceiver_depth=1,
        )
        report = finish(job, folder / "output", verify=True)
        assert report.verification["max_logit_difference"] <= 1e-5
        model, info = AutoModelForImageTextToText.from_pretrained(folder / "output", output_loading_info=True)
        assert not any(info.values())
        assert model.config.model_type == model_type
        tokens = torch.arange(5, 15)[None]
        prompt = torch.cat([torch.tensor([[model.config.image_token_id]]), tokens], dim=1)
        with torch.no_grad():
            expected = language_model(input_ids=tokens).logits
            found = model(input_ids=tokens).logits[..., :258]
            seeing = model(input_ids=prompt, pixel_values=torch.randn(1, 3, 28, 28)).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert seeing.isfinite().all()

    @pytest.mark.parametrize("tower", [(Dinov2Model, Dinov2Config), (ViTModel, ViTConfig)], ids=["dinov2", "vit"])
    def test_a_tower_saved_under_names_of_before_with_pictures_of_its_own(self, parts, tower):
        """transformers renamed the layers of these, and saves them as before; they are prepared unlike CLIP's."""
        folder, _ = parts
        model_class, config_class = tower
        sizes = {"hidden_size": 32, "image_size": 28, "num_attention_heads": 2, "num_hidden_layers": 1}
        vision = model_class(config_class(**sizes, patch_size=14, intermediate_size=64)).eval()
        vision.save_pretrained(folder / "tower")
        assert any(".attention.attention.query." in name for name in open_checkpoint(folder / "tower"))
        prepared = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3], "size": {"height": 28, "width": 28}}
        ViTImageProcessorPil(**prepared).save_pretrained(folder / "tower")
        shape = {"perceiver_depth": 1, "perceiver_num_latents": 5, "cross_attn_gate_init": 0.5}
        finish(plan_inject_lm(folder / "language_model", folder / "tower", **shape), folder / "output")
        model, info = AutoModelForImageTextToText.from_pretrained(folder / "output", output_loading_info=True)
        assert not any(info.values())
        processor = AutoProcessor.from_pretrained(folder / "output")
        assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
        assert processor.image_processor.size["height"] == 28
        pixels = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            torch.testing.assert_close(model.model.vision_tower(pixels)[0], vision(pixels)[0])
            assert model.get_image_features(pixels).pooler_output.shape == (2, 5, 32)
        assert model.config.vision_feature_select_strategy == "default"
        # trained and saved, the tower has those names again
        model.save_pretrained(folder / "trained")
        processor.save_pretrained(folder / "trained")
        finish(plan_folder(folder / "trained"), folder / "half", dtype="bfloat16", verify=True)

    @pytest.mark.parametrize("tied", [False, True])
    def test_rows_of_new_tokens_from_a_text(self, parts, tied):
        folder, language_model = parts
        if tied:
            language_model.config.tie_word_embeddings = True
            language_model.tie_weights()
            language_model.save_pretrained(folder / "language_model")
        rows = {"<|endofchunk|>": "</s>", "<answer>": "ab"}
        options = {"model_type": "otter", "perceiver_depth": 1}
        job = plan_inject_lm(folder / "language_model", folder / "clip", init_rows=rows, **options)
        report = finish(job, folder / "output")
        model = AutoModelForImageTextToText.from_pretrained(folder / "output")
        tokenizer = job.processor.tokenizer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for token, text in rows.items():
                expected = layer.weight[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(dim=0)
                torch.testing.assert_close(layer.weight[tokenizer.convert_tokens_to_ids(token)], expected)
        assert any("<answer>, the mean of the rows of 'ab'" == how for how in report.initialised.values())
        for wrong, sentence in (
            ({"<s>": "a"}, "'<s>' is no token of this model: use .*<answer>"),
            ({"<answer>": ""}, "<answer> cannot start from '', which holds no tokens"),
        ):
            with pytest.raises(ConversionError, match=sentence):
                plan_inject_lm(folder / "language_model", folder / "clip", init_rows=wrong, **options)

    def test_fields_of_the_new_parts(self, parts):
        folder, _ = parts
        for wrong, sentence in (
            ({"num_latents": 5}, "num_latents is no field of the new parts; there are .*perceiver_num_latents"),
            ({"vision_config": {}}, "vision_config is no field of the new parts"),
            ({"perceiver_depth": "two"}, "'perceiver_depth'.* expected int, got str"),
        ):
            with pytest.raises(ConversionError, match=sentence):
                plan_inject_lm(folder / "language_model", folder / "clip", **wrong)
        job = plan_inject_lm(folder / "language_model", folder / "clip", cross_attn_on_text=False)
        assert job.config.cross_attn_on_text is False
        assert any("no preprocessor_config.json" in note for note in job.report.notes)

    def test_a_trained_resampler_is_taken_over(self, parts):
        folder, _ = parts
        shape = {"perceiver_depth": 1, "perceiver_num_latents": 5, "perceiver_head_dim": 8, "max_num_frames": 3}
        finish(plan_inject_lm(folder / "language_model", folder / "clip", seed=3, **shape), folder / "trained")
        trained = AutoModelForImageTextToText.from_pretrained(folder / "trained")
        options = {"model_type": "otter", "cross_attn_gate_init": 0.5, "resampler_from": folder / "trained"}
        job = plan_inject_lm(folder / "language_model", folder / "clip", **options)
        report = finish(job, folder / "output")
        model, info = AutoModelForImageTextToText.from_pretrained(folder / "output", output_loading_info=True)
        assert not any(info.values()) and not any("perceiver" in name for name in report.initialised)
        assert model.config.max_num_frames == 3 and model.config.perceiver_head_dim == 8
        pixels = torch.randn(1, 3, 28, 28)
        with torch.no_grad():
            latents = [one.get_image_features(pixels).pooler_output for one in (model, trained)]
        assert torch.equal(*latents)
        assert str(folder / "trained") in job.lineage
        # in half precision it is the same tower; another one's features mean something else
        finish(plan_folder(folder / "trained"), folder / "half", dtype="bfloat16")
        plan_inject_lm(folder / "language_model", folder / "clip", **options | {"resampler_from": folder / "half"})
        for wrong, sentence in (
            ({"perceiver_num_latents": 6}, "perceiver_num_latents is 6, but 5 of the resampler of .*trained"),
            ({"max_num_frames": 4}, "max_num_frames is 4, but 3 of the resampler"),
            ({"vision_tower": folder / "siglip"}, "was trained behind another vision tower than .*siglip"),
            ({"resampler_from": folder / "clip"}, "expected a Flamingo or Otter folder"),
        ):
            with pytest.raises(ConversionError, match=sentence):
                plan_inject_lm(
                    **{"language_model": folder / "language_model", "vision_tower": folder / "clip", **options} | wrong
                )

    def test_a_resampler_of_2023_needs_no_tokenizer(self, parts, golden):
        folder, _ = parts
        legacy = shutil.copytree(golden / "otter" / "otter_llama_image", folder / "legacy")
        for file in [*legacy.glob("tokenizer*"), *legacy.glob("*tokens*")]:
            file.unlink()
        # here it was trained behind another tower, and that is all that is wrong
        with pytest.raises(ConversionError, match="The resampler of .*legacy was trained behind another vision tower"):
            plan_inject_lm(folder / "language_model", folder / "clip", resampler_from=legacy)

    def test_new_rows_are_the_mean(self, parts):
        folder, language_model = parts
        report = finish(
            plan_inject_lm(folder / "language_model", folder / "clip", perceiver_depth=1), folder / "output"
        )
        head = load_file(folder / "output" / "model.safetensors")["lm_head.weight"]
        expected = language_model.lm_head.weight.mean(dim=0)
        assert head.shape[0] == 261
        torch.testing.assert_close(head[258:], expected.expand(3, -1), atol=1e-6, rtol=0)
        assert report.initialised["lm_head.weight[258:261]"] == "the mean of the rows before them"

    def test_seeds(self, parts):
        folder, _ = parts
        for seed, name in ((0, "a"), (0, "b"), (1, "c")):
            job = plan_inject_lm(folder / "language_model", folder / "clip", seed=seed, perceiver_depth=1)
            finish(job, folder / name)
        a, b, c = (load_file(folder / name / "model.safetensors")["model.perceiver.latents"] for name in "abc")
        assert torch.equal(a, b) and not torch.equal(a, c)
        # the latents are drawn from a unit normal
        assert abs(a.std().item() - 1) < 0.1

    @pytest.mark.parametrize("text_type", ["otter_mpt", "falcon", "gpt_neox", "opt", "qwen3"])
    def test_language_models(self, parts, text_type):
        folder, _ = parts
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 258}
        extra = {
            "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
            "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
        }
        config = AutoConfig.for_model(text_type, **sizes, **extra.get(text_type, {}))
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_config(config).eval()
        language_model.save_pretrained(folder / text_type)
        build_tokenizer().save_pretrained(folder / text_type)
        options = {"cross_attn_every_n_layers": 2, "perceiver_depth": 1}
        finish(plan_inject_lm(folder / text_type, folder / "clip", **options), folder / "output")
        model, info = AutoModelForImageTextToText.from_pretrained(folder / "output", output_loading_info=True)
        assert not any(info.values())
        tokens = torch.arange(5, 15)[None]
        with torch.no_grad():
            found, expected = model(input_ids=tokens).logits[..., :258], language_model(input_ids=tokens).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_a_language_model_is_no_vision_tower(self, parts):
        folder, _ = parts
        with pytest.raises(ConversionError, match="'llama' model, which reads no pictures: name a vision tower"):
            plan_inject_lm(folder / "language_model", folder / "language_model")

    def test_unsupported_language_model(self, parts):
        folder, _ = parts
        config = json.loads((folder / "language_model" / "config.json").read_text()) | {"model_type": "bloom"}
        (folder / "language_model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match="'bloom' model, whose layers images cannot reach"):
            plan_inject_lm(folder / "language_model", folder / "clip")

    def test_sharded_safetensors_source(self, parts):
        folder, _ = parts
        AutoModelForCausalLM.from_pretrained(folder / "language_model").save_pretrained(
            folder / "sharded", max_shard_size="40KB"
        )
        build_tokenizer().save_pretrained(folder / "sharded")
        assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
        for name in ("language_model", "sharded"):
            finish(plan_inject_lm(folder / name, folder / "clip", perceiver_depth=1), folder / f"from_{name}")
        a, b = (load_file(folder / f"from_{name}" / "model.safetensors") for name in ("language_model", "sharded"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        shard = next((folder / "sharded").glob("*00002-of*.safetensors"))
        save_file({"x": torch.zeros(1)}, shard)
        with pytest.raises(ConversionError, match="is in none of"):
            finish(plan_inject_lm(folder / "sharded", folder / "clip", perceiver_depth=1), folder / "broken")
        shard.unlink()
        with pytest.raises(ConversionError, match="lacks .* which its model.safetensors.index.json lists"):
            plan_inject_lm(folder / "sharded", folder / "clip", perceiver_depth=1)
