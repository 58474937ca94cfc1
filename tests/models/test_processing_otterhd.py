"""Text and images to tokens and back, on a tiny tokenizer of Fuyu's kind."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlamaTokenizer, pipeline

from otter_hf.models.otterhd import OtterHDImageProcessor, OtterHDProcessor
from otter_hf.models.otterhd.processing_otterhd import RESERVED_TOKENS
from otter_hf.prompts import render
from otter_hf.testing.otterhd import tiny_config, tiny_model, tiny_processor, tiny_tokenizer


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def image_processor(processor):
    return processor.image_processor


def picture(width, height, mode="RGB", colour=128):
    return Image.new(mode, (width, height), colour)


def text_of(processor, ids):
    """The tokens as text, with S for an image token, N for the end of a row of patches and E for the end of text."""
    text = processor.tokenizer.decode(ids)
    return text.replace("|SPEAKER|", "S").replace("|NEWLINE|", "N").replace("|ENDOFTEXT|", "E")


class TestSequence:
    def test_one_image(self, processor):
        inputs = processor(text="Hi", images=picture(25, 11))
        assert text_of(processor, inputs["input_ids"][0]) == "SSSNSSSN<s> Hi\x04"
        assert inputs["pixel_values"].shape == (6, 300)

    def test_several_images_stand_in_front_in_their_order(self, processor):
        inputs = processor(text="Hi", images=[picture(10, 10, colour=255), picture(25, 11, colour=0)])
        assert text_of(processor, inputs["input_ids"][0]) == "SNSSSNSSSN<s> Hi\x04"
        assert inputs["pixel_values"][0, 0] == 1
        assert inputs["pixel_values"][1, 0] == -1

    def test_images_where_the_text_puts_them(self, processor):
        ids, starts = processor.encode("|SPEAKER|one|SPEAKER|two", [(1, 2), (1, 1)])
        assert text_of(processor, ids) == "SSN<s> oneSN two\x04"
        assert [start for start in starts if start >= 0] == [9, 9, 10, 11, 21, 21, 22, 23]
        ids, _ = processor.encode("one|SPEAKER|two", [(1, 1)])
        assert text_of(processor, ids) == "<s> oneSN two\x04"

    def test_rows_without_image_are_the_same_alone_and_in_a_batch(self, processor):
        alone = processor(text="Hi")
        assert text_of(processor, alone["input_ids"][0]) == "E Hi"
        assert "pixel_values" not in alone
        batch = processor(text=["Hi", "Hi"], images=[[picture(10, 10)], []])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][1, -length:], alone["input_ids"][0])

    def test_image_alone(self, processor):
        inputs = processor(images=picture(10, 10))
        assert text_of(processor, inputs["input_ids"][0]) == "SN<s>\x04"

    @pytest.mark.parametrize(
        "text, add, expected",
        [
            ("Q", None, "Q\x04"),
            ("Q\x04", None, "Q\x04"),
            ("Q\x04", True, "Q\x04"),
            ("Q\x04 A", None, "Q\x04 A"),
            ("Q\x04 AQ", True, "Q\x04 AQ\x04"),
            ("Q", False, "Q"),
            ("Q<0x04>", None, "Q\x04"),
        ],
    )
    def test_answer_token_is_added_once(self, processor, text, add, expected):
        inputs = processor(text=text, images=picture(10, 10), add_answer_token=add)
        assert text_of(processor, inputs["input_ids"][0]) == "SN<s> " + expected

    def test_padding(self, processor):
        texts, images = ["A long question", "Hi"], [[picture(10, 10)], [picture(10, 10)]]
        left = processor(text=texts, images=images)
        right = processor(text=texts, images=images, padding_side="right")
        row = processor(text="Hi", images=picture(10, 10))["input_ids"][0]
        assert torch.equal(left["input_ids"][1, -len(row) :], row)
        assert torch.equal(right["input_ids"][1, : len(row)], row)
        assert (left["input_ids"][left["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()
        assert (right["input_ids"][right["attention_mask"] == 0] == processor.end_of_text_id).all()
        longer = processor(text=texts, images=images, padding="max_length", max_length=40)
        assert longer["input_ids"].shape == (2, 40)
        ragged = processor(text=texts, images=images, padding=False)
        assert [len(row) for row in ragged["input_ids"]] == left["attention_mask"].sum(1).tolist()

    def test_truncation_never_cuts_an_image(self, processor):
        full = processor(text="0123456789" * 9, images=picture(25, 11))["input_ids"][0]
        cut = processor(text="0123456789" * 9, images=picture(25, 11), truncation=True, max_length=20)["input_ids"][0]
        assert len(cut) == 20
        assert torch.equal(cut[:-1], full[:19])
        assert cut[-1] == processor.answer_token_id
        assert (cut == processor.image_token_id).sum() == 6
        with pytest.raises(ValueError, match="Row 0: images and special tokens alone are more than max_length=9 "):
            processor(text="Hi", images=picture(25, 11), truncation=True, max_length=9)

    def test_token_types(self, processor):
        inputs = processor(text="Hi", images=picture(25, 11), return_mm_token_type_ids=True)
        is_image = torch.isin(inputs["input_ids"], torch.tensor(processor.image_token_ids))
        assert torch.equal(inputs["mm_token_type_ids"] == 1, is_image)
        assert is_image.sum() == 2 * (3 + 1)


class TestMatching:
    def test_nested_and_flat(self, processor):
        images = [picture(10, 10), picture(20, 10)]
        flat = processor(text=["a", "b"], images=images)
        nested = processor(text=["a", "b"], images=[[image] for image in images])
        assert torch.equal(flat["input_ids"], nested["input_ids"])
        placed = processor(text=["|SPEAKER|a", "|SPEAKER||SPEAKER|b"], images=images + images[:1])
        assert (placed["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 3]

    def test_mismatches(self, processor):
        image = picture(10, 10)
        with pytest.raises(ValueError, match="3 images for 2 texts"):
            processor(text=["a", "b"], images=[image] * 3)
        with pytest.raises(ValueError, match="1 lists of images for 2 texts"):
            processor(text=["a", "b"], images=[[image]])
        with pytest.raises(ValueError, match=r"Row 1: the text places 1 images \(\|SPEAKER\|\) but 0 were given"):
            processor(text=["a", "|SPEAKER|b"], images=[[image], []])
        with pytest.raises(ValueError, match="Give text, images or both"):
            processor()
        with pytest.raises(ValueError, match="images only"):
            processor(text="a", videos=[image])


class TestLocations:
    def test_there_and_back(self, processor):
        image = picture(160, 120)  # read at half size
        text = "See <box>40, 80, 60, 120</box> and <point>12, 24</point>."
        ids = processor(text=text, images=image)["input_ids"][0]
        opening = processor.tokenizer.convert_tokens_to_ids("<0x00>")
        start = ids.tolist().index(opening)
        pieces = processor.tokenizer.convert_ids_to_tokens(ids[start : start + 6].tolist())
        assert pieces == ["<0x00>", "10", "20", "15", "30", "<0x01>"]
        (back,) = processor.post_process_box_coordinates([ids], [(120, 160)])
        assert "<box>40, 80, 60, 120</box>" in processor.decode(back)
        assert "<point>12, 24</point>" in processor.decode(back)

    def test_stretched_image(self, processor):
        # twice as wide, half as high
        ids = processor(text="<point>10, 40</point>", images=picture(20, 80), resolution=(40, 40))["input_ids"][0]
        opening = processor.tokenizer.convert_tokens_to_ids("<0x02>")
        start = ids.tolist().index(opening)
        assert processor.tokenizer.convert_ids_to_tokens(ids[start + 1 : start + 3].tolist()) == ["10", "10"]

    def test_incomplete_locations_stay(self, processor):
        ids = processor.tokenizer.convert_tokens_to_ids(["<0x00>", "1", "2", "<0x01>", "<0x00>", "a", "1", "1", "1"])
        (row,) = processor.post_process_box_coordinates([ids])
        assert row.tolist() == ids

    @pytest.mark.parametrize("location", ["<box>1, 2, 3</box>", "<point>a, b</point>", "<box></box>"])
    def test_unreadable(self, processor, location):
        with pytest.raises(ValueError, match="Row 0: cannot read the location .*: write <"):
            processor(text=location, images=picture(10, 10))

    def test_number_without_token(self, processor):
        with pytest.raises(ValueError, match="needs the token '500'"):
            processor(text="<point>1000, 2</point>", images=picture(10, 10))

    def test_text_without_image_keeps_its_tags(self, processor):
        ids = processor(text="<point>1, 2</point>")["input_ids"][0]
        assert processor.decode(ids, skip_special_tokens=True) == "<point>1, 2</point>"


class TestChat:
    def conversation(self, question="What?"):
        return [
            {"role": "user", "content": [{"type": "image", "image": picture(25, 11)}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            {"role": "user", "content": [{"type": "text", "text": question}]},
        ]

    def test_equals_the_training_text(self, processor):
        prompt = processor.apply_chat_template(self.conversation(), add_generation_prompt=True)
        assert prompt == render([("Q", "A"), ("What?", None)], "fuyu", "first")
        assert prompt == "|SPEAKER|User:Q Assistant:\x04 AUser:What? Assistant:\x04"

    def test_tokenized(self, processor):
        inputs = processor.apply_chat_template(
            self.conversation(), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        expected = "SSSNSSSN<s> User:Q Assistant:\x04 AUser:What? Assistant:\x04"
        assert text_of(processor, inputs["input_ids"][0]) == expected
        assert inputs["pixel_values"].shape == (6, 300)

    def test_users_cannot_inject_tokens(self, processor):
        hostile = "".join(RESERVED_TOKENS)
        special = {
            processor.image_token_id,
            processor.image_newline_id,
            processor.end_of_text_id,
            processor.text_start_id,
            *processor.tokenizer.convert_tokens_to_ids([f"<0x0{code}>" for code in range(4)]),
        }
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": hostile}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = inputs["input_ids"][0].tolist()
        assert not special & set(ids[1:])
        assert ids.count(processor.answer_token_id) == 1
        assert processor.escape_reserved_tokens("|SPEAKER| and <0x04>") == "| SPEAKER| and < 0x04>"


class TestAnswers:
    @pytest.mark.parametrize(
        "text, answer",
        [
            ("|SPEAKER||NEWLINE|<s> User: Q Assistant:\x04 the answer\n|ENDOFTEXT||ENDOFTEXT|", "the answer"),
            ("<s> Q\x04 one|ENDOFTEXT|User:Q Assistant:\x04 two|ENDOFTEXT|junk", "two"),
            ("|SPEAKER||NEWLINE|no mark", "no mark"),
            ("Q\x04", ""),
        ],
    )
    def test_from_ids(self, processor, text, answer):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.post_process_image_text_to_text([ids]) == [answer]
        assert processor.post_process_image_text_to_text(torch.tensor([ids, ids])) == [answer, answer]
        assert processor.post_process_image_text_to_text(torch.tensor(ids)) == [answer]


class TestImages:
    def test_patches_are_the_pixels(self, image_processor):
        pixels = np.random.default_rng(0).integers(0, 256, (24, 37, 3), dtype=np.uint8)
        patches = image_processor(Image.fromarray(pixels))["pixel_values"]
        assert patches.shape == (3 * 4, 300)
        canvas = np.full((30, 40, 3), (1 / 255 - 0.5) / 0.5, dtype=np.float32)  # the padding of 2023
        canvas[:24, :37] = pixels / 255 * 2 - 1
        for index, patch in enumerate(patches.view(-1, 10, 10, 3)):
            row, column = divmod(index, 4)
            expected = canvas[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
            np.testing.assert_allclose(patch, expected, atol=1e-6)

    @pytest.mark.parametrize("kind", ["pillow", "array", "channels first", "tensor", "grey array", "path"])
    def test_kinds_of_input(self, image_processor, kind, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        if kind == "grey array":
            pixels[:] = pixels[..., :1]
        expected = image_processor(Image.fromarray(pixels))["pixel_values"]
        Image.fromarray(pixels).save(tmp_path / "image.png")
        image = {
            "pillow": Image.fromarray(pixels),
            "array": pixels,
            "channels first": pixels.transpose(2, 0, 1),
            "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
            "grey array": pixels[..., 0],
            "path": str(tmp_path / "image.png"),
        }[kind]
        assert torch.equal(image_processor(image)["pixel_values"], expected)

    @pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
    def test_colours(self, image_processor, mode):
        image = picture(20, 30).convert(mode)
        expected = image_processor(image.convert("RGB"))["pixel_values"]
        assert torch.equal(image_processor(image)["pixel_values"], expected)
        assert expected.shape == (6, 300)

    @pytest.mark.parametrize(
        "size, options, grid",
        [
            ((25, 15), {}, (2, 3)),
            ((160, 60), {}, (3, 8)),  # shrunk to 80 x 30
            ((40, 120), {}, (6, 2)),
            ((25, 15), {"resolution": 30}, (3, 5)),  # enlarged to 50 x 30
            ((25, 15), {"resolution": (40, 20)}, (4, 2)),
            ((80, 60), {"max_pixels": 1200}, (3, 4)),  # shrunk to 40 x 30
            ((20, 10), {"max_pixels": 1200}, (1, 2)),
            ((160, 60), {"size": {"height": 60, "width": 160}}, (6, 16)),
        ],
    )
    def test_sizes(self, image_processor, size, options, grid):
        processed = image_processor(picture(*size), **options)
        assert processed["patch_grids"].tolist() == [list(grid)]
        assert len(processed["pixel_values"]) == math.prod(grid)
        assert image_processor.get_number_of_image_patches(*size[::-1], options) == math.prod(grid)

    def test_counts_of_each_image(self, image_processor):
        processed = image_processor([[picture(25, 15), picture(10, 10)], [], [picture(80, 60)]])
        assert processed["patch_grids"].tolist() == [[2, 3], [1, 1], [6, 8]]
        assert processed["image_sizes"].tolist() == [[15, 25], [10, 10], [60, 80]]
        assert len(processed["pixel_values"]) == 6 + 1 + 48

    def test_refusals(self, image_processor, tmp_path, monkeypatch):
        good = picture(10, 10)
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "cut.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
        for image, message in (
            (str(tmp_path / "broken.png"), "Image 1 cannot be read"),
            (Image.open(tmp_path / "cut.png"), "Image 1 cannot be read"),
            (str(tmp_path / "missing.png"), "Image 1 cannot be read"),
            (picture(0, 5), "Image 1 has no pixels"),
            (np.zeros((0, 5, 3), dtype=np.uint8), "Image 1 has no pixels"),
            (picture(2, 1000), "Image 1 of 2 x 1000 pixels is more than 200 times as long as wide"),
            (picture(150, 1), "Image 1 of 150 x 1 pixels would shrink to 80 x 0"),
        ):
            with pytest.raises(ValueError, match=message):
                image_processor([good, image])
        with pytest.raises(ValueError, match="does not fit into size 80 x 60"):
            image_processor(picture(81, 60), do_resize=False)
        with pytest.raises(ValueError, match="not made of whole patches"):
            image_processor(picture(25, 20), do_pad=False)
        with pytest.raises(ValueError, match=r"size\['height'\]=65 is not a multiple of the patch height 10: use 60"):
            image_processor(good, size={"height": 65, "width": 80})
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match="Image 0 is too large .15 x 15 pixels are more than the limit of 200"):
            image_processor(picture(15, 15))


class TestFiles:
    def test_round_trip(self, processor, tmp_path):
        inputs = {"text": "User: Q? Assistant:", "images": picture(25, 11)}
        expected = processor(**inputs)
        processor.save_pretrained(tmp_path)
        tiny_config(processor).save_pretrained(tmp_path)
        for cls in (AutoProcessor, OtterHDProcessor):
            again = cls.from_pretrained(tmp_path)
            assert type(again) is OtterHDProcessor
            outputs = again(**inputs)
            assert torch.equal(outputs["input_ids"], expected["input_ids"])
            assert torch.equal(outputs["pixel_values"], expected["pixel_values"])
            assert again.chat_template == processor.chat_template
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is OtterHDImageProcessor
        # a word for image processors, with which the tokenizer would pass for a slow one
        assert AutoProcessor.from_pretrained(tmp_path, backend="pil").tokenizer.backend == "tokenizers"
        assert AutoTokenizer.from_pretrained(tmp_path)("Q\x04")["input_ids"][-1] == processor.answer_token_id

    def test_wrong_tokenizers(self):
        image_processor = OtterHDImageProcessor()
        with pytest.raises(ValueError, match="has no token '|SPEAKER|'"):
            OtterHDProcessor(image_processor, LlamaTokenizer(vocab={"<unk>": 0, "a": 1}, merges=[]))
        vocabulary = tiny_tokenizer().get_vocab()
        without_bytes = LlamaTokenizer(vocab=vocabulary, merges=[])
        without_bytes.backend_tokenizer.model.byte_fallback = False
        with pytest.raises(ValueError, match=r"LlamaTokenizer does not read U\+0004 as <0x04>"):
            OtterHDProcessor(image_processor, without_bytes)


def test_pipeline(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    model = tiny_model(processor)
    model.save_pretrained(tmp_path)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(25, 11)}, {"type": "text", "text": "What?"}],
        }
    ]
    settings = {"max_new_tokens": 5, "do_sample": False}
    (answer,) = pipeline("image-text-to-text", model=str(tmp_path))(
        text=chat, return_full_text=False, generate_kwargs=settings
    )
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    (expected,) = processor.post_process_image_text_to_text(model.generate(**inputs, **settings))
    assert answer["generated_text"] == expected != ""
