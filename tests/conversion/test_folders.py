"""Folders to folders: 2023 and back, Flamingo to Otter, training files, LoRA, deltas, dtypes, damage."""

import json
from fnmatch import fnmatch
from pathlib import Path

import golden_numbers
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, MPT, TEXT_CONFIGS, VISION, assert_equal_tensors, logits, save_model, tensors_of
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM, ResNetConfig

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterProcessor
from otter_hf.conversion import (
    ConversionError,
    apply_delta,
    export_legacy,
    finish,
    lora_adapter,
    make_delta,
    plan_flamingo_to_otter,
    plan_folder,
    plan_lora,
    plan_trainer_pt,
)
from otter_hf.conversion import job as conversion_job
from otter_hf.conversion.export import to_legacy_config
from otter_hf.conversion.job import finish_with_adapter, resolve_checkpoint, resolve_folder
from otter_hf.conversion.tensors import open_checkpoint
from otter_hf.loading import load
from otter_hf.testing.otter import build_tokenizer


STALE = ("rotary_emb.inv_freq", "embeddings.position_ids")
# what the original code reads from a configuration
READ_IN_2023 = (
    "model_type architectures vocab_size hidden_size d_model n_heads n_layers n_head n_layer attn_config".split()
)


class TestExportLegacy:
    @pytest.mark.parametrize("name", golden_numbers.FOLDERS)
    def test_2023_to_today_and_back_is_bit_equal(self, golden, tmp_path, name):
        source = golden / "otter" / name
        finish(plan_folder(source), tmp_path / "today", max_shard_size=200_000)
        report = export_legacy(tmp_path / "today", tmp_path / "back")
        assert not report.unexplained
        original = {key: tensor for key, tensor in tensors_of(source).items() if not key.endswith(STALE)}
        assert_equal_tensors(tensors_of(tmp_path / "back"), original)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
        for field in ("model_type", "architectures", "cross_attn_every_n_layers", "max_num_frames", "torch_dtype"):
            assert after.get(field) == before.get(field), field
        for field in READ_IN_2023:
            if before["text_config"].get(field) is not None:
                assert after["text_config"].get(field) == before["text_config"][field], field
        # and the exported folder loads like any of that time
        model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not any(info.values())
        today = AutoModelForImageTextToText.from_pretrained(tmp_path / "today")
        assert_equal_tensors(model.state_dict(), today.state_dict())

    @pytest.mark.parametrize("text", TEXT_CONFIGS)
    def test_today_to_2023_and_back_is_bit_equal(self, tmp_path, text):
        model, _ = save_model(tmp_path / "today", text_config=TEXT_CONFIGS[text])
        export_legacy(tmp_path / "today", tmp_path / "2023")
        names = tensors_of(tmp_path / "2023")
        assert all(name.startswith(("lang_encoder.", "vision_encoder.", "perceiver.")) for name in names)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "2023", output_loading_info=True)
        assert not any(info.values())
        assert_equal_tensors(loaded.state_dict(), model.state_dict())
        assert torch.equal(logits(loaded), logits(model))
        finish(plan_folder(tmp_path / "2023"), tmp_path / "again")
        assert_equal_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "today"))

    def test_what_2023_cannot_express(self, tmp_path):
        save_model(tmp_path / "qwen", text_config=LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2})
        with pytest.raises(ConversionError, match="'qwen2'; the 2023 code knows Llama"):
            export_legacy(tmp_path / "qwen", tmp_path / "output")
        assert not (tmp_path / "output").exists()

    @pytest.mark.parametrize(
        "text, field",
        [
            ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
            ("llama", {"attention_bias": True}),
            ("llama", {"head_dim": 8}),
            ("falcon", {"new_decoder_architecture": True}),
            ("falcon", {"ffn_hidden_size": 64}),
            ("falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
            ("mpt", {"layer_norm_epsilon": 1e-6}),
        ],
        ids=str,
    )
    def test_what_2023_computed_otherwise(self, text, field):
        """A field that its dialect lacks would be another model there, in silence."""
        config = OtterConfig(vision_config=VISION, text_config=TEXT_CONFIGS[text])
        assert to_legacy_config(config)["text_config"]
        config = OtterConfig(vision_config=VISION, text_config=TEXT_CONFIGS[text] | field)
        with pytest.raises(ConversionError, match=f"{next(iter(field))}=.* has no word"):
            to_legacy_config(config)


class TestFlamingoToOtter:
    @pytest.mark.parametrize("rows", [0, 300])
    def test_answer_gets_the_next_id_and_the_mean_row(self, tmp_path, rows):
        flamingo, processor = save_model(tmp_path / "flamingo", "flamingo", rows=rows)
        size = len(processor.tokenizer)
        report = finish(plan_flamingo_to_otter(tmp_path / "flamingo"), tmp_path / "otter", verify=True)
        otter = AutoModelForImageTextToText.from_pretrained(tmp_path / "otter")
        assert type(otter) is OtterForConditionalGeneration
        assert otter.config.answer_token_id == size
        assert otter.config.pad_token_id == processor.tokenizer.pad_token_id
        assert otter.config.tokenizer_vocab_size == size + 1
        assert otter.config.text_config.vocab_size == (rows or size + 1)
        for ours, theirs in (
            (otter.lm_head.weight, flamingo.lm_head.weight),
            (otter.get_input_embeddings().weight, flamingo.get_input_embeddings().weight),
        ):
            assert torch.equal(ours[:size], theirs[:size])
            torch.testing.assert_close(ours[size], theirs[:size].mean(dim=0))
        assert any("<answer>" in how for how in report.initialised.values())
        assert torch.equal(logits(otter)[..., :size], logits(flamingo)[..., :size])
        assert type(AutoProcessor.from_pretrained(tmp_path / "otter")) is OtterProcessor

    def test_row_from_a_text(self, tmp_path):
        flamingo, processor = save_model(tmp_path / "flamingo", "flamingo")
        finish(plan_flamingo_to_otter(tmp_path / "flamingo", answer_init="Answer"), tmp_path / "otter")
        ids = processor.tokenizer("Answer", add_special_tokens=False)["input_ids"]
        row = AutoModelForImageTextToText.from_pretrained(tmp_path / "otter").lm_head.weight[-1]
        torch.testing.assert_close(row, flamingo.lm_head.weight[ids].mean(dim=0))

    def test_an_otter_is_refused(self, tmp_path):
        save_model(tmp_path / "otter")
        with pytest.raises(ConversionError, match="'otter' already"):
            plan_flamingo_to_otter(tmp_path / "otter")


class TestTrainerPt:
    @pytest.mark.parametrize(
        "wrap", [lambda state_dict: state_dict, lambda state_dict: {"model_state_dict": state_dict}]
    )
    def test_trained_weights_replace_those_of_the_base(self, tmp_path, wrap):
        base, _ = save_model(tmp_path / "base")
        tuned, _ = save_model(tmp_path / "tuned", seed=1)
        export_legacy(tmp_path / "tuned", tmp_path / "2023")
        trained = {
            name: tensor
            for name, tensor in tensors_of(tmp_path / "2023").items()
            if "gated_cross_attn" in name
            or name.startswith("perceiver")
            or "lm_head" in name
            or "embed_tokens" in name
        }
        torch.save(wrap({f"module.{name}": tensor for name, tensor in trained.items()}), tmp_path / "final_weights.pt")
        report = finish(plan_trainer_pt(tmp_path / "final_weights.pt", tmp_path / "base"), tmp_path / "output")
        result = tensors_of(tmp_path / "output")
        for name, tensor in result.items():
            is_trained = "gated_cross_attn" in name or any(p in name for p in ("perceiver", "lm_head", "embed_tokens"))
            assert torch.equal(tensor, (tuned if is_trained else base).state_dict()[name]), name
        assert sum(reason == "replaced by that of final_weights.pt" for reason in report.unused.values()) == len(
            trained
        )

    def test_weights_of_another_model(self, tmp_path):
        save_model(tmp_path / "base")
        torch.save({"perceiver.latents": torch.zeros(64, 16)}, tmp_path / "final_weights.pt")
        with pytest.raises(ConversionError, match=r"\(64, 16\) where the model has \(64, 32\)"):
            plan_trainer_pt(tmp_path / "final_weights.pt", tmp_path / "base")


@pytest.fixture
def lora_folder(tmp_path):
    """A 2023 folder with LoRA factors of rank 2 on the query and value projections, and the merged model."""
    model, _ = save_model(tmp_path / "today")
    export_legacy(tmp_path / "today", tmp_path / "lora")
    stored = {}
    for name, tensor in tensors_of(tmp_path / "lora").items():
        name = name.replace("lang_encoder.", "lang_encoder.base_model.model.")
        if name.endswith(("q_proj.weight", "v_proj.weight")) and "lang_encoder" in name:
            module = name.removesuffix(".weight")
            a, b = torch.randn(2, 32), torch.randn(32, 2)
            stored |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
            ours = name.replace("lang_encoder.base_model.model.model.", "model.language_model.")
            model.state_dict()[ours].add_(3 * b @ a)
            name = f"{module}.base_layer.weight"
        stored[name] = tensor
    save_file(stored, tmp_path / "lora" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    config["lora_config"] = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1}
    (tmp_path / "lora" / "config.json").write_text(json.dumps(config))
    return tmp_path / "lora", model


class TestLora:
    def test_merged(self, lora_folder, tmp_path):
        folder, expected = lora_folder
        report = finish(plan_lora(folder), tmp_path / "merged", verify=True)
        merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(merged.state_dict(), expected.state_dict(), atol=1e-5, rtol=1e-5)
        assert not report.unexplained
        # loaded as it is, the factors stay layers of their own; so they are saved, and merged from there all the same
        direct = AutoModelForImageTextToText.from_pretrained(folder)
        torch.testing.assert_close(logits(direct), logits(merged), atol=1e-4, rtol=1e-4)
        direct.save_pretrained(tmp_path / "unmerged")
        AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "unmerged")
        finish(plan_lora(tmp_path / "unmerged"), tmp_path / "again")
        assert_equal_tensors(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "merged"))

    def test_adapter(self, lora_folder, tmp_path):
        peft = pytest.importorskip("peft")
        folder, expected = lora_folder
        job, adapter, config = lora_adapter(folder)
        finish_with_adapter(job, adapter, config, tmp_path / "output")
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "output")
        assert not torch.allclose(logits(base), logits(expected), atol=1e-3)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "output" / "adapter")
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
        model, processor = load(str(tmp_path / "output" / "adapter"), device_map="cpu")
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
        assert processor.tokenizer.get_vocab() == job.processor.tokenizer.get_vocab()

    def test_golden_adapter_computes_the_stored_logits(self, golden, tmp_path):
        peft = pytest.importorskip("peft")
        folder = golden / "otter" / "otter_mpt_lora"
        job, adapter, config = lora_adapter(folder)
        finish_with_adapter(job, adapter, config, tmp_path / "output")
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "output", attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "output" / "adapter")
        tensors = load_file(folder / "golden.safetensors")
        mask = tensors["attention_mask"]
        with torch.no_grad():
            found = model(input_ids=tensors["lang_x"], pixel_values=tensors["vision_x"], attention_mask=mask).logits
        torch.testing.assert_close(found[mask == 1], tensors["logits"][mask == 1], atol=1e-4, rtol=1e-5)

    def test_without_factors(self, tmp_path):
        save_model(tmp_path / "today")
        with pytest.raises(ConversionError, match="no lora_config"):
            plan_lora(tmp_path / "today")


class TestDelta:
    def test_on_a_language_model(self, tmp_path):
        tuned, processor = save_model(tmp_path / "tuned")
        # the base has no rows for the special tokens
        base = LlamaForCausalLM(tuned.config.text_config)
        base.resize_token_embeddings(len(build_tokenizer()))
        base.save_pretrained(tmp_path / "base")
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
        report = apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
        assert any("taken over in full" in note for note in report.notes)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(again.state_dict(), tuned.state_dict(), atol=1e-6, rtol=0)
        delta = tensors_of(tmp_path / "delta")["lm_head.weight"]
        rows = len(build_tokenizer())
        torch.testing.assert_close(delta[:rows], (tuned.lm_head.weight[:rows] - base.lm_head.weight).detach())
        assert torch.equal(delta[rows:], tuned.lm_head.weight[rows:])

    def test_of_two_models(self, tmp_path):
        save_model(tmp_path / "base")
        tuned, _ = save_model(tmp_path / "tuned", seed=1)
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
        torch.testing.assert_close(tensors_of(tmp_path / "again"), dict(tuned.state_dict()), atol=1e-6, rtol=0)

    def test_wrong_base(self, tmp_path):
        save_model(tmp_path / "tuned")
        save_model(tmp_path / "base", text_config=LLAMA | {"hidden_size": 48})
        with pytest.raises(ConversionError, match="do not belong together"):
            apply_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "output")
        assert not (tmp_path / "output").exists()


class TestDtype:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_weights_and_configuration(self, tmp_path, dtype):
        model, _ = save_model(tmp_path / "today")
        report = finish(plan_folder(tmp_path / "today"), tmp_path / "half", dtype=dtype, verify=True)
        half = AutoModelForImageTextToText.from_pretrained(tmp_path / "half")
        assert half.dtype == getattr(torch, dtype)
        assert_equal_tensors(half.state_dict(), model.to(half.dtype).state_dict())
        assert report.verification["max_logit_difference"] > 0
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype

    def test_verify_with_a_tower_that_takes_any_size(self, tmp_path):
        tower = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
        save_model(tmp_path / "today", vision_config=tower)
        report = finish(plan_folder(tmp_path / "today"), tmp_path / "copy", verify=True)
        assert report.verification["max_logit_difference"] == 0

    def test_shards(self, tmp_path):
        save_model(tmp_path / "today")
        report = finish(plan_folder(tmp_path / "today"), tmp_path / "shards", max_shard_size=100_000)
        assert len(report.files) > 2
        assert_equal_tensors(tensors_of(tmp_path / "shards"), tensors_of(tmp_path / "today"))

    def test_a_copy_is_the_same_model(self, tmp_path):
        _, processor = save_model(tmp_path / "today", text_config=MPT, rows=300)
        finish(plan_folder(tmp_path / "today"), tmp_path / "copy")
        assert_equal_tensors(tensors_of(tmp_path / "copy"), tensors_of(tmp_path / "today"))
        assert (
            AutoProcessor.from_pretrained(tmp_path / "copy").tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        )

    def test_own_head_is_not_tied_away(self, tmp_path):
        model, _ = save_model(tmp_path / "today", text_config=MPT)
        stored = tensors_of(tmp_path / "today")
        stored["lm_head.weight"] = stored["model.language_model.wte.weight"] + 1
        save_file(stored, tmp_path / "today" / "model.safetensors", {"format": "pt"})
        report = finish(plan_folder(tmp_path / "today"), tmp_path / "copy")
        assert any("not tied" in note for note in report.notes)
        copy, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "copy", output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(copy.lm_head.weight, stored["lm_head.weight"])


class TestDamage:
    """Every damaged source ends in one sentence, and leaves no folder behind."""

    def refuse(self, folder, tmp_path, match):
        with pytest.raises(ConversionError, match=match) as error:
            finish(plan_folder(folder), tmp_path / "output")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "output").exists() and not list(tmp_path.glob(".output*"))

    @pytest.fixture
    def folder(self, tmp_path):
        save_model(tmp_path / "model")
        return tmp_path / "model"

    def test_truncated_safetensors(self, folder, tmp_path):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.refuse(folder, tmp_path, "damaged: it has .* bytes where its header says")

    def test_damaged_header(self, folder, tmp_path):
        (folder / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
        self.refuse(folder, tmp_path, "header cannot be read")

    def test_truncated_pickle(self, folder, tmp_path):
        torch.save(tensors_of(folder), tmp_path / "whole.bin")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:5000])
        self.refuse(folder, tmp_path, "is damaged")

    def test_pickled_code(self, folder, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        (folder / "model.safetensors").unlink()
        torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
        self.refuse(folder, tmp_path, "pickled objects other than tensors")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_torchscript(self, tmp_path):
        """As OpenAI published CLIP, and open_clip of 2023 kept it."""
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-L-14.pt")
        with pytest.raises(ConversionError, match="TorchScript archive.*openai/clip-vit-large-patch14"):
            open_checkpoint(tmp_path / "ViT-L-14.pt")

    def test_config_only(self, folder, tmp_path):
        (folder / "model.safetensors").unlink()
        self.refuse(folder, tmp_path, "holds no weights")

    def test_no_config(self, folder, tmp_path):
        (folder / "config.json").unlink()
        self.refuse(folder, tmp_path, "holds no config.json")
        (folder / "adapter_config.json").write_text("{}")
        self.refuse(folder, tmp_path, "is an adapter: put it into its model first .merge_and_unload")

    def test_damaged_config(self, folder, tmp_path):
        (folder / "config.json").write_text('{"model_type": "otter",')
        self.refuse(folder, tmp_path, "config.json is damaged")

    def test_another_kind_of_model(self, folder, tmp_path):
        (folder / "config.json").write_text('{"model_type": "llama"}')
        self.refuse(folder, tmp_path, "'llama'; expected a Flamingo or Otter folder")

    def test_missing_weight(self, folder, tmp_path):
        stored = tensors_of(folder)
        del stored["model.perceiver.latents"]
        save_file(stored, folder / "model.safetensors")
        self.refuse(folder, tmp_path, "model.perceiver.latents is in none of")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda tensor: tensor * float("nan"), "model.perceiver.latents holds values that are NaN or infinite"),
            (
                lambda tensor: tensor.to(torch.int64),
                "model.perceiver.latents holds int64, where the model has floating",
            ),
        ],
    )
    def test_weights_of_no_use(self, folder, tmp_path, change, told):
        tensors = tensors_of(folder)
        tensors["model.perceiver.latents"] = change(tensors["model.perceiver.latents"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.refuse(folder, tmp_path, told)

    def test_a_dtype_too_small(self, folder, tmp_path):
        tensors = tensors_of(folder)
        tensors["model.perceiver.latents"] *= 1e6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match="NaN or infinite in float16: the source is of no use, or --dtype"):
            finish(plan_folder(folder), tmp_path / "output", dtype="float16")
        finish(plan_folder(folder), tmp_path / "output", dtype="float16", allow=True)

    def test_another_process_writes_the_same(self, folder, tmp_path):
        with FileLock(tmp_path / ".output.lock"), pytest.raises(OSError, match="output is in use by another process"):
            finish(plan_folder(folder), tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_2023_folder_without_tokenizer(self, folder, tmp_path):
        export_legacy(folder, tmp_path / "2023")
        for file in (tmp_path / "2023").glob("*token*"):
            file.unlink()
        self.refuse(tmp_path / "2023", tmp_path, "--tokenizer")
        build_tokenizer().save_pretrained(tmp_path / "tokenizer")
        finish(plan_folder(tmp_path / "2023", str(tmp_path / "tokenizer")), tmp_path / "output")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "output")
        expected = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.config.answer_token_id == expected.config.answer_token_id
        assert torch.equal(logits(model), logits(expected))

    def test_output_is_never_overwritten(self, folder, tmp_path):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "precious.txt").write_text("mine")
        with pytest.raises(ConversionError, match="exists already"):
            finish(plan_folder(folder), tmp_path / "output")
        assert (tmp_path / "output" / "precious.txt").read_text() == "mine"

    def test_failing_verification_leaves_nothing(self, folder, tmp_path, monkeypatch):
        job = plan_folder(folder)
        name = "model.perceiver.latents"
        # another value at every reading: the file and the reference cannot agree
        job.tensors[name] = job.tensors[name].map(lambda value: torch.randn_like(value))
        with pytest.raises(ConversionError, match="computes other logits"):
            finish(job, tmp_path / "output", verify=True)
        assert not (tmp_path / "output").exists()


def test_of_a_repository_what_is_read_is_downloaded(tmp_path, monkeypatch):
    files = {
        "both": ["config.json", "model-1-of-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
        "pickled": ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin", "tf_model.h5", "optimizer.bin"],
        "openflamingo/OpenFlamingo-3B": ["checkpoint.pt", "README.md"],
    }

    def download(_, name, filename=None, allow_patterns=()):
        patterns = [filename or allow_patterns] if isinstance(filename or allow_patterns, str) else allow_patterns
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in files[name]:
            if any(fnmatch(file, pattern) for pattern in patterns):
                (folder / file).touch()
        return str(folder / (filename or ""))

    monkeypatch.setattr(conversion_job, "_download", download)

    def downloaded(folder):
        return sorted(path.name for path in folder.iterdir())

    assert downloaded(resolve_folder("pickled", weights=False)) == ["config.json", "merges.txt", "vocab.json"]
    assert downloaded(resolve_folder("both")) == sorted(files["both"][:3])
    assert downloaded(resolve_folder("pickled")) == sorted(files["pickled"][:4])
    assert downloaded(resolve_checkpoint("openflamingo/OpenFlamingo-3B").parent) == ["checkpoint.pt"]
    assert resolve_checkpoint("folder/gone.pt") == Path("folder/gone.pt")  # a mistyped file is no repository


def test_report_names_the_sources_by_checksum(tmp_path):
    save_model(tmp_path / "model")
    finish(plan_folder(tmp_path / "model"), tmp_path / "output")
    report = json.loads((tmp_path / "output" / "conversion_report.json").read_text())
    (source,) = report["sources"].values()
    assert source[0]["file"] == "model.safetensors"
    finish(plan_folder(tmp_path / "output"), tmp_path / "again")
    again = json.loads((tmp_path / "again" / "conversion_report.json").read_text())
    assert next(iter(again["sources"].values()))[0]["sha256"] == report["files"][0]["sha256"]
