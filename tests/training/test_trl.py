"""TRL's trainers, from the scripts in `examples/`, on a tiny Otter and a tiny OtterHD."""

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin

from otter_hf import FlamingoProcessor, OtterProcessor
from otter_hf.data import OtterCollator, OtterHDCollator
from otter_hf.data.collator_flamingo import FlamingoCollator
from otter_hf.prompts import chat_template
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


pytest.importorskip("trl", reason="TRL is not installed")
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

from otter_hf.training.trl_rows import TRLCollator  # noqa: E402


FAMILIES = {"otter": otter_tiny, "otterhd": otterhd_tiny}
CONFIGS = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "grpo": trl.GRPOConfig}
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run("sft", "otter", *flags)` trains two steps and returns the trained model and the one before."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(kind: str, family: str, *flags: str):
        tiny = FAMILIES[family]
        processor = tiny.tiny_processor()
        before = tiny.tiny_model(processor)
        before.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        rows = []
        for i, colour in enumerate(["red", "green", "blue", "black"]):
            # pictures and prompts of different sizes
            image, prompt = Image.new("RGB", (20 + 5 * i, 24), colour), user("what color?" + "?" * i)
            rows.append(
                {
                    "sft": {"images": [image], "prompt": prompt, "completion": assistant(colour)},
                    "dpo": {
                        "images": [image],
                        "prompt": prompt,
                        "chosen": assistant(colour),
                        "rejected": assistant("no idea"),
                    },
                    "grpo": {"image": image, "prompt": prompt, "answer": colour},
                }[kind]
            )
        (tmp_path / "data").mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
        script = importlib.import_module(f"trl_{kind}")
        if kind == "grpo":
            # what a random model says is never the answer, and equal rewards teach nothing
            monkeypatch.setattr(script, "likeness", lambda prompts, **_: [float(i % 2) for i in range(len(prompts))])
        arguments = ["--model_name_or_path", tmp_path / "base", "--dataset_name", tmp_path / "data"]
        arguments += ["--output_dir", tmp_path / "out", *"--max_steps 2 --per_device_train_batch_size 2".split()]
        arguments += "--use_cpu --bf16 False --report_to none --learning_rate 1e-2 --save_strategy no".split()
        parser = trl.TrlParser((trl.ScriptArguments, CONFIGS[kind], trl.ModelConfig))
        script.main(*parser.parse_args_and_config([*map(str, arguments), "--disable_tqdm", "True", *flags]))
        after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        return after, before, AutoProcessor.from_pretrained(tmp_path / "out")

    return run


def changed(after, before) -> set[str]:
    old = dict(before.named_parameters())
    return {name for name, parameter in after.named_parameters() if not torch.equal(parameter, old[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_sft_and_dpo(run, kind, family):
    after, before, processor = run(kind, family, "--max_length", "256")
    names = changed(after, before)
    assert any("vision_tower" in name or "vision_embed_tokens" in name for name in names)
    assert any("lm_head" in name for name in names)
    # the saved processor asks in the form that was trained
    content = [{"type": "image"}, {"type": "text", "text": "what color?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (20, 24)), text=prompt, add_special_tokens=False, return_tensors="pt")
    assert after.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("family", FAMILIES)
def test_grpo(run, family, monkeypatch):
    generate, seen = GenerationMixin.generate, []

    def record(self, *args, **kwargs):
        seen.append((kwargs["input_ids"], kwargs["attention_mask"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", record)
    flags = "--num_generations 2 --max_completion_length 4 --generation_batch_size 4"
    after, before, processor = run("grpo", family, *flags.split())
    assert changed(after, before)
    # prompts of different lengths, and no padding among what the model reads
    pad = processor.tokenizer.pad_token_id
    assert any((mask == 0).any() for _, mask in seen)
    assert not any((ids[mask == 1] == pad).any() for ids, mask in seen)


def test_dpo_with_adapter(run):
    """With LoRA the model without its adapter is the reference; only the adapter is saved."""
    after, before, _ = run("dpo", "otter", "--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    weights = {name: p for name, p in after.named_parameters() if "lora_" not in name}
    assert len(weights) == len(dict(before.named_parameters()))
    assert any(p.abs().max() > 0 for name, p in after.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["otter_llama_image", "otter_mpt_image", "otterhd"])
def test_the_tokens_of_our_trainer(kind, request):
    """One conversation through TRL's collator, of which TRL's own makes other tokens, and through ours."""
    image = Image.new("RGB", (20, 24))
    turns = [("what color?", "It is red."), ("sure?", "yes")]
    if kind == "otterhd":
        processor = otterhd_tiny.tiny_processor()
        ours = OtterHDCollator(processor, packing=False)
    else:
        processor = OtterProcessor.from_pretrained(request.getfixturevalue("golden") / "otter" / kind)
        processor.chat_template = chat_template("simple")
        ours = OtterCollator(processor, format="simple")
    expected = ours([{"id": "a", "turns": turns, "media_per_turn": [1, 0], "media": [[image]]}])
    first, second = ([*user(question), *assistant(answer)] for question, answer in turns)
    collate = TRLCollator(processor)
    batch = collate([{"images": [image], "messages": first + second}])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    # of a completion its answer alone
    row = {"images": [image], "prompt": first + second[:1], "completion": second[1:]}
    last = collate([row])
    assert torch.equal(last["input_ids"], expected["input_ids"])
    learned = (last["labels"] != -100).nonzero()[:, 1]
    assert learned.tolist() == list(range(int(learned[0]), expected["labels"].shape[1]))
    assert processor.decode(last["labels"][0, learned[0] :], skip_special_tokens=True).strip().startswith("yes")
    pair = {"image": image, "prompt": row["prompt"], "chosen": second[1:], "rejected": assistant("no, not at all")}
    preferences = collate([pair])
    length = expected["input_ids"].shape[1]
    assert torch.equal(preferences["input_ids"][:1, :length], expected["input_ids"])
    assert torch.equal(preferences["completion_mask"][0].nonzero()[:, 0], learned)
    assert preferences["completion_mask"][1].sum() > len(learned)
    # messages beside a pair are not the pair, and tables have null for the fields of other parts
    again = collate([{**pair, "messages": first}])
    assert torch.equal(again["input_ids"], preferences["input_ids"])
    nulls = {"text": None, "image": None}
    parted = [
        {**message, "content": [{**nulls, "type": "text", "text": message["content"]}]} for message in first + second
    ]
    parted[0]["content"].insert(0, {**nulls, "type": "image"})
    assert torch.equal(collate([{"images": [image], "messages": parted}])["input_ids"], expected["input_ids"])
    for nothing in ({"image": None}, {"images": None}, {"images": [None]}):
        assert len(collate([{**nothing, "messages": first}])["labels"]) == 1
    for wrong, message in (
        ({"image": image, "text": "a"}, "needs messages, or prompt and completion"),
        ({"image": image, "prompt": "a", "completion": "b"}, "texts as prompt and completion"),
        ({"image": image, "messages": first, "chosen": first, "rejected": first}, "needs prompt and chosen"),
        ({"image": image, "messages": first, "videos": ["a.mp4"]}, "has videos, which is not trained on"),
        ({"image": image, "messages": first, "tools": [{"name": "search"}]}, "has tools"),
    ):
        with pytest.raises(ValueError, match=message):
            collate([wrong])
    # cut in front of the completion, the answers of the prompt are not learned in its place
    with pytest.raises(ValueError, match="cut before"):
        TRLCollator(processor, int(learned[0]))([row])


def test_a_processor_without_a_chat_template():
    """Of OpenFlamingo: the rows were all the word None."""
    tiny = otter_tiny.tiny_processor()
    processor = FlamingoProcessor(tiny.image_processor, tiny.tokenizer)
    sample = {
        "id": "a",
        "turns": [("what color?", "red")],
        "media_per_turn": [1],
        "media": [[Image.new("RGB", (9, 9))]],
    }
    expected = FlamingoCollator(processor, format="simple")([sample])
    row = {"image": Image.new("RGB", (9, 9)), "messages": [*user("what color?"), *assistant("red")]}
    batch = TRLCollator(processor)([row])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"], expected["labels"]) and processor.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_are_trained_on(family, tmp_path):
    """`assistant_only_loss` on rows with messages and pictures: the labels are the marked answers and their ends."""
    processor = FAMILIES[family].tiny_processor()
    model = FAMILIES[family].tiny_model(processor)
    messages = [*user("what color?"), *assistant("red"), *user("sure?"), *assistant("yes")]
    rows = Dataset.from_list([{"images": [Image.new("RGB", (20, 24))], "messages": messages}])
    arguments = trl.SFTConfig(tmp_path, assistant_only_loss=True, max_length=None, use_cpu=True, report_to="none")
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    end = {"otter": "<|endofchunk|>", "otterhd": ""}[family]
    learned = processor.decode(labels[labels != -100]).replace(" ", "")
    assert learned == f"red{end}yes{end}" + ("|ENDOFTEXT|" if family == "otterhd" else "")
