"""OtterHD's training batches: labels, packing, mixed resolutions, limits."""

import json
import pickle

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Trainer, TrainingArguments

from otter_hf.data.collator_otterhd import OtterHDCollator
from otter_hf.data.samples import SampleError
from otter_hf.prompts import clean_text
from otter_hf.testing.otterhd import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def sample(*turns, images=(), id="s1", **more):
    media = [[image] for image in images]
    counts = [len(media)] + [0] * (len(turns) - 1)
    return {"id": id, "turns": list(turns), "media": media, "media_per_turn": counts, **more}


def picture(width=10, height=10):
    return Image.new("RGB", (width, height), (200, 30, 90))


def learned(processor, batch, row=0):
    labels = batch["labels"][row]
    return processor.decode(labels[labels != -100])


ONE = ("Q1", "A1")
TWO = ("Q2", "A2")


class TestLabels:
    def test_every_answer(self, processor):
        batch = OtterHDCollator(processor)([sample(ONE, TWO, images=[picture()])])
        text = "|SPEAKER||NEWLINE|<s> User:Q1 Assistant:\x04 A1User:Q2 Assistant:\x04 A2|ENDOFTEXT|"
        assert processor.decode(batch["input_ids"][0]) == text
        assert learned(processor, batch) == "A1 A2|ENDOFTEXT|"
        supervised = batch["labels"] != -100
        assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])

    def test_rule_of_2023(self, processor):
        right, collate = OtterHDCollator(processor), OtterHDCollator(processor, labels="2023")
        assert learned(processor, collate([sample(ONE, images=[picture()])])) == "A1|ENDOFTEXT|"
        two = collate([sample(ONE, TWO, images=[picture()])])
        assert learned(processor, two) == "A1User:Q2 Assistant:\x04|ENDOFTEXT|"
        # the ids are the same, only the labels differ
        assert torch.equal(two["input_ids"], right([sample(ONE, TWO, images=[picture()])])["input_ids"])

    def test_images_stand_in_front_of_their_turn_or_between_its_words(self, processor):
        media = {"media": [[picture()], [picture()]], "media_per_turn": [1, 1]}
        later = OtterHDCollator(processor)([{**sample(ONE, TWO), **media}])
        image = "|SPEAKER||NEWLINE|"
        text = f"{image}<s> User:Q1 Assistant:\x04 A1{image} User:Q2 Assistant:\x04 A2|ENDOFTEXT|"
        assert processor.decode(later["input_ids"][0]) == text and learned(processor, later) == "A1 A2|ENDOFTEXT|"
        film = {"media": [[picture(), picture()]], "media_per_turn": [1], "media_places": [[1]]}
        between = OtterHDCollator(processor)([{**sample(ONE), **film, "task_description": "Look."}])
        text = f"<s> Look.\nUser:Q{image}{image} 1 Assistant:\x04 A1|ENDOFTEXT|"
        assert processor.decode(between["input_ids"][0]) == text and learned(processor, between) == "A1|ENDOFTEXT|"

    def test_images_of_2023(self, processor):
        collate = OtterHDCollator(processor, labels="2023", resolution=(20, 20))
        several = collate([sample(ONE, images=[picture(), picture()])])
        assert len(several["pixel_values"]) == 4
        without = collate([sample(ONE)])
        assert torch.equal(without["pixel_values"], torch.full((4, 300), -1.0))

    def test_golden_batch(self, golden):
        folder = golden / "otterhd" / "train"
        processor = AutoProcessor.from_pretrained(folder)
        expected = load_file(folder / "golden.safetensors")
        facts = json.loads((folder / "golden.json").read_text())
        images = [[Image.open(folder / "image_0.png")], [Image.open(folder / "image_1.png")], []]
        samples = [
            sample(*[(clean_text(q), clean_text(a, answer=True)) for q, a in turns], images=of_row)
            for turns, of_row in zip(facts["turns"], images, strict=True)
        ]
        options = {"resolution": tuple(facts["train_resolution_wh"]), "packing": False}
        batch = OtterHDCollator(processor, labels="2023", **options)(samples)
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name], expected[name]), name
        patches = torch.cat([expected[f"image_patches_{row}"][0] for row in range(3)])
        # before Pillow 13 tall pictures differ by up to 3 of 255 (findings/pillow_13_resizes_*.sh)
        atol = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 0.03
        torch.testing.assert_close(batch["pixel_values"], patches, atol=atol, rtol=0)
        right = OtterHDCollator(processor, **options)(samples)
        assert learned(processor, right, 1) == "There are two dogs. The ball is under the table.|ENDOFTEXT|"

    def test_tokens_in_the_data_are_words(self, processor):
        batch = OtterHDCollator(processor)([sample(("a\x04b |SPEAKER| <0x04>", "c<0x04>d\x04"), images=[picture()])])
        ids = batch["input_ids"][0].tolist()
        assert ids.count(processor.image_token_id) == 1
        assert ids.count(processor.answer_token_id) == 1
        assert learned(processor, batch) == "c< 0x04>d|ENDOFTEXT|"

    def test_locations_in_answers_are_learned(self, processor):
        answer = "at <box>10, 20, 30, 40</box>"
        batch = OtterHDCollator(processor)([sample(("where?", answer), images=[picture(80, 60)])])
        assert learned(processor, batch).startswith("at \x00510")
        labels = batch["labels"][0]
        assert processor.tokenizer.convert_tokens_to_ids("<0x00>") in labels

    def test_task_description_is_not_learned(self, processor):
        batch = OtterHDCollator(processor)([sample(ONE, images=[picture()], task_description="Be brief.")])
        assert "<s> Be brief.\nUser:Q1" in processor.decode(batch["input_ids"][0])
        assert learned(processor, batch) == "A1|ENDOFTEXT|"


class TestBatch:
    def samples(self):
        return [
            sample(ONE, images=[picture(40, 30)], id="a"),
            sample(ONE, TWO, images=[picture(20, 20), picture(80, 60)], id="b"),
            sample(("hello", "there"), id="c"),
        ]

    def test_packed_and_padded_learn_the_same(self, processor):
        model = tiny_model(processor).train()
        packed = OtterHDCollator(processor)(self.samples())
        padded = OtterHDCollator(processor, packing=False, pad_to_multiple_of=8)(self.samples())
        assert padded["input_ids"].shape[1] % 8 == 0
        assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
        assert torch.equal(packed["pixel_values"], padded["pixel_values"])
        assert (packed["labels"][0, packed["cu_seq_lens_q"][:-1].long()] == -100).all()
        torch.testing.assert_close(model(**packed).loss, model(**padded).loss, atol=1e-5, rtol=1e-5)

    def test_a_batch_without_images_trains_every_parameter(self, processor):
        model = tiny_model(processor).train()
        batch = OtterHDCollator(processor)([sample(ONE)])
        assert batch["pixel_values"].shape == (0, 300)
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_dynamic_resolution(self, processor):
        samples = [sample(ONE, images=[picture(15, 33)], id=str(i)) for i in range(16)]

        def counts(**options):
            torch.manual_seed(0)
            batch = OtterHDCollator(processor, packing=False, dynamic_resolution=(20, 30, 40), **options)(samples)
            return set((batch["input_ids"] == processor.image_token_id).sum(1).tolist())

        assert counts() == {4, 9, 16}
        assert len(counts(draw_per="batch")) == 1
        assert counts(draw_per="batch") < {4, 9, 16}

    def test_a_sample_may_bring_its_resolution(self, processor):
        samples = [sample(ONE, images=[picture(15, 33)], id=str(side)) | {"resolution": side} for side in (20, 40)]
        batch = OtterHDCollator(processor, packing=False, dynamic_resolution=(30,))(samples)
        assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 16]

    def test_it_keeps_that_beside_samples_without_one(self, processor):
        collate = OtterHDCollator(processor, packing=False, resolution=(20, 20))
        samples = [sample(ONE, images=[picture()], resolution=10), sample(ONE, images=[picture()])]
        patches = (collate(samples)["input_ids"] == processor.image_token_id).sum(dim=1)
        assert patches.tolist() == [1, 4]

    def test_videos_are_images_in_order(self, processor):
        frames = [picture(10, 10), picture(20, 10), picture(30, 10)]
        video = {"id": "v", "turns": [ONE], "media": [frames], "media_per_turn": [1]}
        batch = OtterHDCollator(processor)([video])
        assert len(batch["pixel_values"]) == 6

    def test_trainer(self, processor, tmp_path):
        data = [sample(("Q", "red"), images=[picture(20 + 10 * (i % 3), 10)] * (i % 2), id=str(i)) for i in range(8)]
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=1e-3,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_model(processor), arguments, OtterHDCollator(processor), train_dataset=data)
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train()
        assert trainer.evaluate(data)["eval_loss"] < before

    def test_pickles_for_workers(self, processor):
        collate = pickle.loads(pickle.dumps(OtterHDCollator(processor)))
        assert learned(processor, collate([sample(ONE)])) == "A1|ENDOFTEXT|"


class TestLimits:
    def test_oldest_turns_go_first(self, processor):
        conversation = sample(ONE, TWO, images=[picture(40, 30)])
        full = OtterHDCollator(processor)([conversation])["input_ids"].shape[1]
        batch = OtterHDCollator(processor, max_length=full - 1)([conversation])
        assert learned(processor, batch) == "A2|ENDOFTEXT|"
        assert len(batch["pixel_values"]) == (batch["input_ids"] == processor.image_token_id).sum() == 12
        same = OtterHDCollator(processor, max_length=full)([conversation])
        assert same["input_ids"].shape[1] == full

    def test_an_answer_that_is_cut(self, processor):
        long = sample(("Q", "abcdefghij"), images=[picture()])
        full = OtterHDCollator(processor)([long])["input_ids"].shape[1]
        for labels in ("answers", "2023"):
            batch = OtterHDCollator(processor, max_length=full - 4, on_overlong="truncate", labels=labels)([long])
            assert learned(processor, batch) == "abcdefg"
            assert batch["input_ids"].shape[1] == full - 4

    def test_overlong(self, processor):
        long, short = sample(("Q", "abcdefghij"), id="long"), sample(ONE, id="short")
        limit = {"max_length": OtterHDCollator(processor)([short])["input_ids"].shape[1]}
        with pytest.raises(SampleError, match="Sample 'long' has .* the limit is max_length="):
            OtterHDCollator(processor, **limit)([short, long])
        batch = OtterHDCollator(processor, **limit, on_overlong="skip")([short, long])
        assert learned(processor, batch) == "A1|ENDOFTEXT|"
        with pytest.raises(SampleError, match="Sample 'long' and the rest of its batch are longer"):
            OtterHDCollator(processor, **limit, on_overlong="skip")([long])
        image = sample(ONE, images=[picture(40, 30)], id="long")  # of which not even the picture fits
        for one, size in ((long, 5), (long, 3), (image, 9)):
            with pytest.raises(
                SampleError, match="'long' and the rest of its batch are cut before their answers start"
            ):
                OtterHDCollator(processor, max_length=size, on_overlong="truncate")([one])

    def test_bad_image_names_the_sample(self, processor):
        with pytest.raises(SampleError, match="Sample 'x7': Image 1 has no pixels"):
            OtterHDCollator(processor)([sample(ONE, images=[picture(), picture(0, 5)], id="x7")])

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"labels": "all"}, "labels must be one of answers, 2023, got 'all'"),
            ({"draw_per": "image"}, "draw_per must be one of"),
            ({"on_overlong": "drop"}, "on_overlong must be one of"),
            ({"resolution": 448, "dynamic_resolution": (448,)}, "not both"),
        ],
    )
    def test_bad_options(self, processor, options, message):
        with pytest.raises(ValueError, match=message):
            OtterHDCollator(processor, **options)
