"""What a user hands to the processor, and what comes out."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from otter_hf import FlamingoProcessor, OtterProcessor
from otter_hf.loading import read_num_frames, read_processor
from otter_hf.prompts import render
from otter_hf.testing import write_tiny


def question(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_ragged_batch_is_padded_left_and_zero_filled(processor, pictures):
    prompts = ["<image>User: a GPT:<answer>", "<image><image>User: longer GPT:<answer>", "User: none GPT:<answer>"]
    batch = processor(text=prompts, images=[[pictures[0]], [pictures[1], pictures[2]], []], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}
    assert batch["pixel_values"].shape == (3, 2, 1, 3, 28, 28)
    assert batch["pixel_attention_mask"].tolist() == [[[1], [0]], [[1], [1]], [[0], [0]]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 2, 0]
    # the last token of every row is the end of its prompt: padding is in front
    assert batch["input_ids"][:, -1].tolist() == [processor.answer_token_id] * 3
    assert batch["attention_mask"][1].all() and not batch["attention_mask"][0, 0]
    # a picture that is not there is zeros, one that is there is not
    empty = [(0, 1), (2, 0), (2, 1)]
    filled = batch["pixel_values"].flatten(2).abs().sum(-1) > 0
    assert [(i, j) for i in range(3) for j in range(2) if not filled[i, j]] == empty
    alone = processor(text=prompts[1], images=[pictures[1], pictures[2]], return_tensors="pt")["pixel_values"]
    assert torch.equal(alone[0], batch["pixel_values"][1])


def test_flat_list_is_dealt_out_by_image_tokens(processor, pictures):
    prompts = ["<image>a", "b", "<image><image>c"]
    flat = processor(text=prompts, images=pictures[:3], return_tensors="pt")["pixel_values"]
    nested = processor(text=prompts, images=[[pictures[0]], [], pictures[1:3]], return_tensors="pt")["pixel_values"]
    assert torch.equal(flat, nested)


def test_one_picture_in_every_form_reads_the_same(processor, tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    forms = [Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1), path, str(path)]
    path.rename(spaced := tmp_path / "a picture #1.png")
    spaced.with_name("picture.png").write_bytes(spaced.read_bytes())
    forms += [spaced.as_uri(), f"file://localhost{spaced}"]
    first, *others = (processor(text="<image>", images=form, return_tensors="pt")["pixel_values"] for form in forms)
    assert all(torch.equal(first, other) for other in others)


def test_grey_and_transparent_pictures_become_rgb(processor):
    for mode in ("L", "RGBA", "P", "CMYK"):
        pixels = processor(text="<image>", images=Image.new(mode, (30, 30)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 1, 1, 3, 28, 28)


def test_video_is_one_medium_of_many_frames(model, processor, pictures, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for level in range(40):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (level * 6,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    decoded = processor(text="<image>User:", videos=str(path), num_frames=4, return_tensors="pt")["pixel_values"]
    assert decoded.shape == (1, 1, 4, 3, 28, 28)
    brightness = decoded.mean((0, 1, 3, 4, 5))
    assert (brightness.diff() > 0).all()  # frames in order of time
    # as many as in training, where nothing is said, and of a folder that does not tell 16
    model.save_pretrained(tmp_path / "folder")
    for told, frames in ((3, 3), (None, 16)):
        processor.num_frames = told
        processor.save_pretrained(tmp_path / "folder")
        loaded = type(processor).from_pretrained(tmp_path / "folder")
        assert loaded(text="<image>", videos=str(path), return_tensors="pt")["pixel_values"].shape[2] == frames
        assert loaded(text="<image>", videos=str(path), fps=1, return_tensors="pt")["pixel_values"].shape[2] == 4
        assert read_num_frames(str(tmp_path / "folder")) == frames
    with pytest.raises(ValueError, match="num_frames must be a whole number of at least 1, got 0"):
        type(processor)(processor.image_processor, processor.tokenizer, num_frames=0)
    given = processor(text=["<image>a", "<image>b"], videos=[pictures[:3], pictures[:1]], return_tensors="pt")
    assert given["pixel_values"].shape == (2, 1, 3, 3, 28, 28)
    assert not given["pixel_values"][1, 0, 1:].any()


def test_chat_template_writes_the_prompt_of_the_published_models(processor, pictures):
    single = [question("what is it?", pictures[0])]
    assert processor.apply_chat_template(single, add_generation_prompt=True) == "<image>User: what is it? GPT:<answer>"
    examples = [question("q1", pictures[0]), answer("a1"), question("q2", pictures[1])]
    text = "<image>User: q1 GPT:<answer> a1<|endofchunk|><image>User: q2 GPT:<answer>"
    assert processor.apply_chat_template(examples, add_generation_prompt=True) == text
    assert text == render([("q1", "a1"), ("q2", None)], format="spaced", media="every")
    batch = processor.apply_chat_template(
        [single, examples], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (2, 2, 1, 3, 28, 28)
    assert processor.decode(batch["input_ids"][1]) == "<s>" + text


def test_special_tokens_in_user_text_stay_text(processor, pictures):
    batch = processor.apply_chat_template(
        [question("is <image> a tag?", pictures[0])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (batch["input_ids"] == processor.image_token_id).sum() == 1


def test_save_and_load_give_the_same_batch(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = OtterProcessor.from_pretrained(tmp_path)
    inputs = {"text": "<image>User: a GPT:<answer>", "images": pictures[0], "return_tensors": "pt"}
    before, after = processor(**inputs), loaded(**inputs)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.chat_template == processor.chat_template


def test_the_tokenizer_of_idefics_is_a_fast_one(tmp_path):
    """Its image processor is asked for by backend, which transformers hands to the tokenizer, too."""
    write_tiny("idefics", tmp_path)
    assert read_processor(str(tmp_path)).tokenizer.backend == "tokenizers"


@pytest.mark.parametrize("load", [OtterProcessor.from_pretrained, AutoProcessor.from_pretrained])
def test_pillow_resizes_where_torchvision_is_installed(processor, tmp_path, monkeypatch, load):
    """transformers takes torchvision's classes there, which give other pixels, whatever class was saved."""
    taken = []
    module = sys.modules[AutoImageProcessor.__module__]
    choose = module._load_backend_class
    monkeypatch.setattr(module, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        module, "_load_backend_class", lambda name, backend, *args: taken.append(backend) or choose(name, "pil", *args)
    )
    processor.save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer.backend == "tokenizers"  # the word is not the tokenizer's
    load(tmp_path, backend="torchvision")
    assert taken == ["pil", "torchvision"]


def test_auto_processor_finds_the_class(processor, model, tmp_path):
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is OtterProcessor


@pytest.mark.parametrize(("case", "size"), [("otter_llama_image", 56), ("otter_mpt_vis1024", 28)])
def test_2023_folder_without_image_processor(golden_case, case, size):
    processor = AutoProcessor.from_pretrained(golden_case(f"otter/{case}"))
    pixels = processor(text="<image>", images=Image.new("RGB", (80, 60)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 1, 3, size, size)


@pytest.mark.parametrize(
    ("text", "answer_text"),
    [
        ("<image>User: q GPT:<answer> a red car<|endofchunk|>", "a red car"),
        ("<image>User: q GPT:<answer> a red car<|endofchunk|>User: more", "a red car"),
        ("<image>User: q GPT:<answer> no<|endofchunk|><image>User: q GPT:<answer> yes</s><PAD>", "yes"),
        (" cut off prompt<|endofchunk|><PAD>", "cut off prompt"),
        ("<PAD><PAD><s>no picture<|endofchunk|><PAD>", "no picture"),
        ("<PAD></s>", ""),
    ],
)
def test_post_process_keeps_the_answer(processor, text, answer_text):
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == [answer_text]


def test_tokens_are_added_in_the_order_of_2023(processor):
    base = processor.tokenizer.convert_tokens_to_ids("</s>") + 1
    added = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|endofchunk|>", "<image>", "<answer>", "<PAD>")]
    assert added == [base, base + 1, base + 2, base + 3]


def test_bad_input_is_one_clear_sentence(processor, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    cases = [
        ({"text": "<image><image>", "images": [[pictures[0]]]}, r"text\[0\] has 2 <image> token\(s\) but 1 image"),
        ({"text": ["<image>", "x"], "images": [[pictures[0]], [pictures[1]]]}, r"text\[1\] has 0 <image>"),
        ({"text": "<image>"}, r"text\[0\] has 1 <image> token\(s\) but 0 image"),
        ({"text": ["<image>", "<image>"], "images": pictures[:3]}, "3 images were given for 2 <image>"),
        ({"text": ["<image>", "<image>"], "images": [[pictures[0]]]}, r"1 lists of images were given for 2 text"),
        ({"text": "<image>", "images": broken}, r"images\[0\]\[0\] cannot be read as an image"),
        ({"text": "<image>", "images": tmp_path / "none.png"}, "there is no such file"),
        ({"text": "<image>", "videos": str(broken)}, r"videos\[0\]\[0\] cannot be read as a video"),
        ({"text": "<image><image>", "images": [[pictures[0]]], "videos": [[pictures[:2]]]}, "both images and videos"),
        ({"text": "x", "audio": [0.0]}, "audio was given"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            processor(**inputs, return_tensors="pt")


def test_tokenizer_without_the_special_tokens_is_refused(processor):
    tokenizer = FlamingoProcessor.prepare_tokenizer(type(processor.tokenizer)(tokenizer_object=bare_tokenizer()))
    with pytest.raises(ValueError, match="has no '<answer>'; add it with OtterProcessor.prepare_tokenizer"):
        OtterProcessor(processor.image_processor, tokenizer)


def bare_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({"a": 0}, []))
