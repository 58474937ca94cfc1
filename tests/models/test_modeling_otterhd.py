"""What OtterHD's model adds to transformers' Fuyu, on a tiny random model."""

import copy

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FuyuConfig,
    FuyuForCausalLM,
)

from otter_hf.models.otterhd import OtterHDForConditionalGeneration, OtterHDModel
from otter_hf.testing.otterhd import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor)


def picture(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def rows(processor):
    """Three rows of different lengths: one picture, two pictures, none; each as a batch of one."""
    samples = [
        ("User: What is it? Assistant:", [picture(35, 20)]),
        ("User: Which one? Assistant:", [picture(20, 20, 1), picture(15, 42, 2)]),
        ("User: Hi! Assistant:", []),
    ]
    return [processor(text=text, images=[images]) for text, images in samples]


@pytest.fixture(scope="module")
def batch(processor):
    return processor(
        text=["User: What is it? Assistant:", "User: Which one? Assistant:", "User: Hi! Assistant:"],
        images=[[picture(35, 20)], [picture(20, 20, 1), picture(15, 42, 2)], []],
    )


def pack(rows):
    """The rows in one row, without padding."""
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    positions = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
    patches = torch.cat([row["pixel_values"] for row in rows if "pixel_values" in row])
    return {"input_ids": ids, "position_ids": positions, "pixel_values": patches}


def logits_alone(model, rows):
    with torch.no_grad():
        return torch.cat([model(**row).logits for row in rows], dim=1)


class TestPacking:
    @pytest.mark.parametrize("attention", ["varlen_sdpa", "sdpa", "eager"])
    @pytest.mark.parametrize("use_cache", [None, True, False])
    def test_samples_do_not_see_each_other(self, model, rows, attention, use_cache):
        model = copy.deepcopy(model)
        model.set_attn_implementation(attention)
        with torch.no_grad():
            output = model(**pack(rows), use_cache=use_cache)
        torch.testing.assert_close(output.logits, logits_alone(model, rows), atol=1e-5, rtol=1e-5)
        assert output.past_key_values is None

    def test_boundaries_given_as_lengths(self, model, rows):
        lengths = [row["input_ids"].shape[1] for row in rows]
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        longest = max(lengths)
        flash = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        flash |= {"max_length_q": longest, "max_length_k": longest}
        with torch.no_grad():
            logits = model(**pack(rows), **flash).logits
            torch.testing.assert_close(logits, model(**pack(rows)).logits)
        with pytest.raises(ValueError, match="position_ids"):
            model(input_ids=pack(rows)["input_ids"], pixel_values=pack(rows)["pixel_values"], **flash)

    @pytest.mark.slow
    def test_compiled(self, model, rows):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            logits = compiled(**pack(rows), use_cache=True).logits
        torch.testing.assert_close(logits, logits_alone(model, rows), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients(self, model, rows, checkpointing):
        packed, alone = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        if checkpointing:
            packed.activation_checkpointing_enable()
        labels = [row["input_ids"].masked_fill(row["input_ids"] < 6, -100) for row in rows]
        for row in labels:
            row[:, 0] = -100
        count = sum((row != -100).sum().item() for row in labels)
        packed(**pack(rows), labels=torch.cat(labels, dim=1)).loss.backward()
        for row, row_labels in zip(rows, labels, strict=True):
            alone(**row, labels=row_labels, num_items_in_batch=count).loss.backward()
        for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)

    @pytest.mark.parametrize("attention", ["varlen_sdpa", "sdpa"])
    def test_several_rows(self, model, rows, attention):
        model = copy.deepcopy(model)
        model.set_attn_implementation(attention)
        ids = rows[2]["input_ids"].repeat(2, 2)
        positions = torch.arange(ids.shape[1] // 2).repeat(2, 2)
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions).logits
        expected = logits_alone(model, [rows[2]]).repeat(2, 2, 1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


class TestBatches:
    def test_rows_in_a_batch_are_as_alone(self, model, rows, batch):
        with torch.no_grad():
            logits = model(**batch).logits
        for index, row in enumerate(rows):
            length = row["input_ids"].shape[1]
            torch.testing.assert_close(logits[index, -length:], logits_alone(model, [row])[0], atol=1e-5, rtol=1e-5)

    def test_right_padding(self, processor, model, rows):
        batch = processor(
            text=["User: What is it? Assistant:", "User: Hi! Assistant:"],
            images=[[picture(35, 20)], []],
            padding_side="right",
        )
        with torch.no_grad():
            logits = model(**batch).logits
        for index, row in enumerate((rows[0], rows[2])):
            length = row["input_ids"].shape[1]
            torch.testing.assert_close(logits[index, :length], logits_alone(model, [row])[0], atol=1e-5, rtol=1e-5)

    def test_the_picture_matters(self, processor, model, rows):
        other = processor(text="User: What is it? Assistant:", images=picture(35, 20, seed=9))
        with torch.no_grad():
            difference = model(**other).logits[:, -1] - model(**rows[0]).logits[:, -1]
        assert difference.abs().max() > 0.1

    def test_bfloat16_takes_float_patches(self, model, rows):
        half = copy.deepcopy(model).to(torch.bfloat16)
        with torch.no_grad():
            logits = half(**rows[0]).logits
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


class TestLoss:
    def test_supervised_positions_give_the_full_loss(self, model, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : labels.shape[1] // 2] = -100
        model = copy.deepcopy(model).train()
        output = model(**batch, labels=labels)
        assert output.logits is None
        output.loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        full = model(**batch, labels=labels, skip_logits=False)
        assert full.logits.shape[:2] == labels.shape
        full.loss.backward()
        torch.testing.assert_close(output.loss, full.loss)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)
        items = torch.tensor(1000)
        partial = model(**batch, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(partial, full.loss * (labels[:, 1:] != -100).sum() / items)

    def test_evaluation_returns_logits(self, model, batch):
        with torch.no_grad():
            output = model(**batch, labels=batch["input_ids"])
        assert output.logits.shape[:2] == batch["input_ids"].shape
        assert output.loss is not None

    def test_nothing_supervised_is_no_nan(self, model, batch):
        model = copy.deepcopy(model).train()
        loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
        loss.backward()
        assert loss == 0
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())

    def test_every_parameter_gets_a_gradient_without_images(self, processor, model):
        inputs = processor(text="User: Hi! Assistant:", images=[[]])
        model = copy.deepcopy(model).train()
        no_patches = torch.empty(0, model.model.vision_embed_tokens.in_features)
        model(**inputs, pixel_values=no_patches, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_only_the_last_logits(self, model, batch):
        with torch.no_grad():
            last = model(**batch, logits_to_keep=1).logits
            torch.testing.assert_close(last, model(**batch).logits[:, -1:])


class TestGeneration:
    @pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}, {}])
    def test_left_padded_batch_is_as_alone(self, model, rows, batch, options):
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = model.generate(**batch, **settings, **options)
        for index, row in enumerate(rows):
            alone = model.generate(**row, **settings)
            assert generated[index, -6:].tolist() == alone[0, -6:].tolist()

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_beams(self, model, rows, batch, use_cache):
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        settings |= {"num_beams": 3, "num_return_sequences": 2}
        generated = model.generate(**batch, **settings, use_cache=use_cache)
        assert len(generated) == 2 * len(rows)
        for index, row in enumerate(rows):
            alone = model.generate(**row, **settings)
            assert generated[2 * index : 2 * index + 2, -4:].tolist() == alone[:, -4:].tolist()

    def test_several_samples_of_each_row(self, model, batch):
        generated = model.generate(
            **batch, max_new_tokens=3, do_sample=True, num_return_sequences=4, eos_token_id=None, pad_token_id=0
        )
        assert generated.shape == (12, batch["input_ids"].shape[1] + 3)

    def test_continued_conversation_keeps_its_cache(self, model, rows):
        first = model.generate(
            **rows[0], max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        more = torch.cat([first.sequences, rows[2]["input_ids"][:, 1:]], dim=1)
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected = model.generate(more, pixel_values=rows[0]["pixel_values"], **settings)
        for assisted in ({}, {"prompt_lookup_num_tokens": 2}):
            cache = copy.deepcopy(first.past_key_values)
            assert torch.equal(model.generate(more, past_key_values=cache, **settings, **assisted), expected)

    def test_only_the_new_tokens_of_a_conversation(self, model, rows):
        """transformers also takes these alone, with the mask of all of them; their patches are then those given."""
        first, second = rows[0], rows[1]
        ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, pixel_values=pixels, **settings)[:, -4:]
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
        inputs = {**second, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **settings)[:, -4:], expected)

    @pytest.mark.slow
    def test_compiled_decoding(self, model, rows):
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        expected = model.generate(**rows[0], **settings)
        compiled = copy.deepcopy(model)
        compiled.forward = torch.compile(compiled.forward, backend="eager", fullgraph=True)
        assert torch.equal(compiled.generate(**rows[0], **settings, cache_implementation="static"), expected)


class TestRefusals:
    def test_image_tokens_without_patches(self, model, rows):
        with pytest.raises(ValueError, match=r"input_ids holds \d+ image tokens .* but pixel_values is missing"):
            model(input_ids=rows[0]["input_ids"])

    def test_patches_of_the_wrong_width(self, model, rows):
        with pytest.raises(ValueError, match="patches of width 299, .* need 300"):
            model(input_ids=rows[0]["input_ids"], pixel_values=rows[0]["pixel_values"][:, :-1])

    def test_wrong_number_of_patches(self, model, rows):
        for patches in (rows[0]["pixel_values"][:-1], torch.empty(0, 300)):
            with pytest.raises(ValueError, match="do not match"):
                model(input_ids=rows[0]["input_ids"], pixel_values=patches)
        with pytest.raises(ValueError, match="image tokens but pixel_values"):
            model.generate(rows[0]["input_ids"], pixel_values=rows[0]["pixel_values"][:-1], num_beams=2)

    def test_patches_in_the_wrong_row(self, model, batch):
        # the total is right, which a flat tensor could not tell from a right batch
        first = (batch["input_ids"][0] == model.config.image_token_id).sum()
        patches = batch["pixel_values"]
        lists = [patches[None, : first + 1], patches[None, first + 1 :], patches[None, :0]]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with pytest.raises(ValueError, match="Row 0 has 8 image tokens in input_ids but 9 patches"):
            model(**inputs, image_patches=lists)
        with pytest.raises(ValueError, match="2 entries for 3 rows"):
            model(**inputs, image_patches=lists[:2])

    def test_flex_attention(self, model):
        config = copy.deepcopy(model.config)
        with pytest.raises(ValueError, match="flex_attention"):
            OtterHDForConditionalGeneration._from_config(config, attn_implementation="flex_attention")


class TestFiles:
    def test_round_trip_and_plain_fuyu(self, model, rows, tmp_path):
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = model(**rows[0]).logits
            for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
                again = auto_class.from_pretrained(tmp_path)
                assert type(again) is OtterHDForConditionalGeneration
                assert torch.equal(again(**rows[0]).logits, expected)
            assert type(AutoModel.from_pretrained(tmp_path)) is OtterHDModel
            # the folder stays a Fuyu, which plain transformers reads with the right numbers
            fuyu, info = FuyuForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values()), info
            torch.testing.assert_close(fuyu(**rows[0]).logits, expected, atol=1e-5, rtol=1e-5)

    def test_plain_fuyu_keeps_its_classes(self, model):
        config = FuyuConfig(text_config=model.config.text_config, patch_size=10)
        assert type(AutoModelForCausalLM.from_config(config)) is FuyuForCausalLM

    @pytest.mark.parametrize("naming", ["2023", "first revision", "bin"])
    def test_names_of_2023(self, model, rows, tmp_path, naming):
        model.save_pretrained(tmp_path)
        tensors = {}
        for name, tensor in model.state_dict().items():
            if naming == "first revision":
                name = name.replace("model.language_model.", "model.")
            else:
                name = name.replace("model.language_model.", "language_model.model.")
                name = name.replace("lm_head.", "language_model.lm_head.")
            tensors[name.replace("model.vision_embed_tokens", "vision_embed_tokens")] = tensor.contiguous()
        file = tmp_path / "model.safetensors"
        if naming == "bin":
            file.unlink()
            torch.save(tensors, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, file, metadata={"format": "pt"})
        for cls in (AutoModelForCausalLM, AutoModel):
            again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
            assert not info["missing_keys"]
            assert all("lm_head" in name for name in info["unexpected_keys"])
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**rows[0]).logits, model(**rows[0]).logits)
        # and what we save from them has the names every version of transformers knows
        again.save_pretrained(tmp_path / "saved")
        names = set(load_file(tmp_path / "saved" / "model.safetensors"))
        assert not any(name.startswith(("model.layers", "model.embed_tokens")) for name in names)
        _, info = FuyuForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values()), info

    def test_lora(self, model, rows, tmp_path):
        from peft import LoraConfig, PeftModel, get_peft_model

        targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=2, target_modules=targets))
        lora.train()
        lora(**rows[0], labels=rows[0]["input_ids"]).loss.backward()
        trained = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
        assert len(trained) == 2 * len(targets) * model.config.text_config.num_hidden_layers
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        lora.eval().save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        with torch.no_grad():
            logits = lora(**rows[0]).logits
            assert torch.equal(again(**rows[0]).logits, logits)
            torch.testing.assert_close(lora.merge_and_unload()(**rows[0]).logits, logits, atol=1e-4, rtol=1e-4)


def test_other_outputs(model, rows):
    with torch.no_grad():
        states = model(**rows[0], output_hidden_states=True).hidden_states
    assert len(states) == model.config.text_config.num_hidden_layers + 1
    assert "PersimmonDecoderLayer" in model._no_split_modules
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(**rows[0], output_attentions=True).attentions
    length = rows[0]["input_ids"].shape[1]
    assert attentions[0].shape == (1, 4, length, length)


def test_inputs_embeds(model, rows):
    embeds = model.get_input_embeddings()(rows[0]["input_ids"])
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, pixel_values=rows[0]["pixel_values"]).logits
        assert torch.equal(logits, model(**rows[0]).logits)


def test_an_image_token_beyond_the_vocabulary(model):
    """The id of Fuyu's vocabulary is the default of every configuration."""
    tokens = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    small = copy.deepcopy(model)
    small.config.image_token_id = 71011
    assert torch.equal(small.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False), tokens)


def test_resized_vocabulary(model, rows):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(512)
    assert larger.config.text_config.vocab_size == 512
    with torch.no_grad():
        logits = larger(**rows[0]).logits
    assert logits.shape[-1] == 512
    torch.testing.assert_close(logits[..., : model.config.text_config.vocab_size], model(**rows[0]).logits)
