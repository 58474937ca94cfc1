"""What trainers other than ours rely on: gradients, modes, precisions, names, in each family."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_flamingo import images, row, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

from otter_hf import OtterConfig, OtterForConditionalGeneration
from otter_hf.models.quantization import keep_stored_weights
from otter_hf.testing import otterhd as otterhd_tiny


RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "hidden_act": "relu",
}


def otter(decoder="llama", **kwargs):
    model = tiny_model(decoder, **kwargs)
    other = OtterForConditionalGeneration(OtterConfig(**model.config.to_dict())).eval()
    other.load_state_dict(model.state_dict())
    return other


def otterhd(**text_config):
    return otterhd_tiny.tiny_model(otterhd_tiny.tiny_processor(), **text_config)


FAMILIES = {"flamingo": tiny_model, "otter": otter, "otterhd": otterhd}


def batch(model) -> dict[str, torch.Tensor]:
    if hasattr(model.config, "perceiver_depth"):
        inputs = {"input_ids": row(1, 5), "pixel_values": images(1, 2)}
    else:
        ids = row(length=12) + 10
        ids[:, 1:4] = model.config.image_token_id
        width = model.config.patch_size**2 * 3
        inputs = {"input_ids": ids, "pixel_values": torch.randn(3, width, generator=torch.Generator().manual_seed(0))}
    return inputs | {"labels": inputs["input_ids"].clone()}


ADAPTED = {
    "tower": r".*vision_tower.*(q_proj|v_proj)|.*vision_embed_tokens",
    "resampler": r".*perceiver.*(to_q|to_kv)",
    "all": "all-linear",
}


@pytest.mark.parametrize(
    "family, part", [*(("otter", part) for part in ADAPTED), ("otterhd", "tower"), ("otterhd", "all")]
)
def test_reentrant_checkpointing_reaches_what_is_trained(family, part):
    """The same gradients as without checkpointing, for adapters in any part."""
    gradients = []
    for kwargs in (None, {"use_reentrant": True}):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=ADAPTED[part], init_lora_weights=False)
        model = get_peft_model(FAMILIES[family](), config)
        if kwargs is not None:
            model.activation_checkpointing_enable(kwargs)
        model.train()(**batch(model)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, reentrant = gradients
    assert plain and not [name for name in plain if plain[name] is None or reentrant[name] is None]
    for name, gradient in plain.items():
        torch.testing.assert_close(reentrant[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_batch_norms_of_a_frozen_tower_keep_their_statistics():
    """A manual loop, PEFT or any trainer: what the adapter does not hold must not move."""

    def moved(model):
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running_mean" in name}
        model.train()(**batch(model)).loss.backward()
        after = dict(model.named_buffers())
        assert before
        return any(not torch.equal(after[name], buffer) for name, buffer in before.items())

    def adapted(pattern):
        return get_peft_model(tiny_model(vision=RESNET), LoraConfig(r=2, target_modules=pattern))

    whole = tiny_model(vision=RESNET)
    assert moved(whole)
    whole.model.vision_tower.requires_grad_(False)
    assert not moved(whole)
    assert not moved(adapted(["q_proj"]))
    assert not moved(adapted(r".*vision_tower.*convolution"))
    assert adapted(["q_proj"]).train().base_model.model.model.language_model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_in_bfloat16_below_a_float32_tower(family):
    model = FAMILIES[family]()
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    for part in ("language_model", "vision_tower", "vision_embed_tokens"):
        if hasattr(model.model, part):
            getattr(model.model, part).to(torch.bfloat16 if part == "language_model" else torch.float32)
    outputs = model.train()(**inputs, skip_logits=False)
    outputs.loss.backward()
    assert torch.corrcoef(torch.stack([outputs.logits.float().flatten(), expected.flatten()]))[0, 1] > 0.99
    assert all(p.grad is not None for name, p in model.named_parameters() if "post_layernorm" not in name)
    if hasattr(model.model, "perceiver"):
        model.model.language_model.float()
        model.model.vision_tower.to(torch.bfloat16)
        assert torch.isfinite(model.eval()(**inputs).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_trainer_predicts_logits_alone(family, tmp_path):
    model = FAMILIES[family]()
    arguments = TrainingArguments(
        tmp_path, report_to="none", use_cpu=True, per_device_eval_batch_size=1, remove_unused_columns=False
    )
    inputs = {name: tensor[0] if name != "pixel_values" else tensor for name, tensor in batch(model).items()}

    def collate(rows):
        pixels = rows[0]["pixel_values"]
        return {n: t[None] for n, t in rows[0].items() if n != "pixel_values"} | {"pixel_values": pixels}

    trainer = Trainer(model, arguments, collate)
    assert trainer.predict([inputs]).predictions.shape == (1, 12, model.config.get_text_config().vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_found_by_its_name(family, tmp_path):
    """As TRL looks: the class that config.json names, else the causal Auto class, without any remote code."""
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [type(model).__name__]
    assert config.auto_map == {} and "auto_map" not in (tmp_path / "config.json").read_text()
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(tmp_path)) is type(model)


def test_files_of_2023_name_the_class_that_reads_them():
    fuyu = AutoConfig.for_model("fuyu", architectures=["FuyuForCausalLM"], text_config={"vocab_size": 99})
    assert fuyu.architectures == ["OtterHDForConditionalGeneration"]
    assert fuyu.text_config.rope_parameters["rope_theta"] == 25000


def test_tied_weights_of_bin_files_on_disk(tmp_path):
    model = tiny_model("otter_mpt")
    model.config.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    devices = {
        "model.vision_tower": "cpu",
        "model.perceiver": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    }
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map=devices, offload_folder=tmp_path / "off"
    )
    inputs = batch(model)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_go_where_offloaded_weights_are_computed_with(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "off"
    )
    assert next(offloaded.parameters()).is_meta and offloaded.device.type == "cpu"
    inputs = {name: value.to(offloaded.device) for name, value in batch(model).items() if name != "labels"}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(**inputs, **settings), model.generate(**inputs, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_layers_are_not_repacked(family, tmp_path, monkeypatch):
    """bitsandbytes marks its layers so where the CPU has AVX512-BF16."""
    make = torch.nn.Linear.__init__

    def marked(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = True

    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.nn.Linear, "__init__", marked)
    assert FAMILIES[family]().lm_head.support_avx512bf16_for_cpu
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not any(module.support_avx512bf16_for_cpu for module in loaded.modules() if type(module) is torch.nn.Linear)
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    keep_stored_weights(other)
    assert not other[0].support_avx512bf16_for_cpu
