"""Demonstrations, rows and prompts of the few-shot harness."""

import json

import pyarrow as pa
import pytest
import torch
from benchmark_rows import BLUE, RED, write_parquet

from otter_hf.evaluation.fewshot.demonstrations import (
    RicesIndex,
    fixed_demonstrations,
    picture_features,
    query_set,
    random_demonstrations,
    test_subset,
)
from otter_hf.evaluation.fewshot.prompts import FLAMINGO_TEMPLATE, prompts_for
from otter_hf.evaluation.fewshot.rows import Rows


test_subset.__test__ = False


def test_the_same_seed_draws_the_same_rows_in_any_order():
    candidates = query_set(20, 100, seed=1)
    assert candidates == query_set(20, 100, seed=1) != query_set(20, 100, seed=2)
    drawn = {row: random_demonstrations(candidates, 4, 1, row) for row in range(10)}
    assert {row: random_demonstrations(candidates, 4, 1, row) for row in reversed(range(10))} == drawn
    assert len({tuple(rows) for rows in drawn.values()}) == 10
    assert all(len(set(rows)) == 4 and set(rows) <= set(candidates) for rows in drawn.values())
    assert test_subset(5, 50, 3) == test_subset(5, 50, 3) and len(test_subset(5, 50, 3)) == 5
    assert test_subset(None, 7, 3) == test_subset(-1, 7, 3) == list(range(7))
    with pytest.raises(ValueError, match="4 shots"):
        random_demonstrations([1, 2], 4, 1, 0)


def test_a_test_row_is_not_its_own_demonstration():
    def itself(number):
        return number in (1, 3)

    for row in range(20):
        assert set(random_demonstrations([1, 2, 3, 4], 2, 1, row, itself)) == {2, 4}
    with pytest.raises(ValueError, match="3 shots need as many training rows, there are 2"):
        random_demonstrations([1, 2, 3, 4], 3, 1, 0, itself)
    index = RicesIndex(torch.eye(4), candidates=[1, 2, 3, 4])
    assert index.nearest(torch.tensor([4.0, 3.0, 2.0, 1.0]), 2, itself) == [4, 2]
    # the same for all but the rows that are among them
    fixed = fixed_demonstrations(range(9), 3, 1)
    assert fixed == fixed_demonstrations(range(9), 3, 1) != fixed_demonstrations(range(9), 3, 2)
    without = fixed_demonstrations(range(9), 3, 1, lambda number: number == fixed[1])
    assert without[:2] == [fixed[0], fixed[2]] and without[2] not in fixed
    with pytest.raises(ValueError, match="3 shots need as many training rows, there are 2"):
        fixed_demonstrations([1, 2], 3, 1)


@pytest.mark.parametrize("answers", [None, []])
def test_rows_without_their_truth_are_refused(tmp_path, answers):
    """As the test splits of challenges have them: nothing could be scored, or all were wrong."""
    rows = [{"image": RED, "question": "a?", "answers": ["x"]}, {"image": RED, "question": "b?", "answers": answers}]
    with pytest.raises(ValueError, match="Row 1 of .* has no answers"):
        Rows(str(write_parquet(tmp_path / "rows.parquet", rows)), "test", "vqa")
    labelled = [{"image": RED, "label": label} for label in (0, 1, -1)]
    table = Rows(str(write_parquet(tmp_path / "labels.parquet", labelled)), "test", "imagenet")
    with pytest.raises(ValueError, match="Row 2 of .* has the label -1, which is none of 2 classes"):
        table.check_labels(2)
    told = Rows(str(write_parquet(tmp_path / "told.parquet", labelled[:2])), "test", "imagenet")
    told.check_labels(2)


def test_rows_are_the_same_by_words_and_pixels(tmp_path):
    """Whatever ids and files they have: training and test set may overlap."""
    rows = [{"question_id": 1, "image": RED, "question": "a?", "answers": ["x"]}]
    rows += [{**rows[0], "image": BLUE}, {**rows[0], "question": "b?"}]
    train = Rows(str(write_parquet(tmp_path / "train.parquet", rows)), "train", "vqa")
    test = Rows(str(write_parquet(tmp_path / "test.parquet", [{**rows[0], "question_id": 9}])), "test", "vqa")
    assert [train.is_row_of(number, test, 0) for number in range(3)] == [True, False, False]


def test_rices_puts_the_most_similar_picture_next_to_the_question():
    train = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    index = RicesIndex(train, candidates=[10, 11, 12, 13])
    assert index.nearest(torch.tensor([5.0, 1.0]), 2) == [12, 10]
    assert index.nearest(torch.tensor([0.0, 1.0]), 3) == [10, 12, 11]
    with pytest.raises(ValueError, match="5 shots"):
        index.nearest(torch.tensor([0.0, 1.0]), 5)


def test_picture_features_come_from_any_encoder_and_are_kept(tmp_path, pictures, monkeypatch):
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    config.image_size, config.patch_size = 28, 14
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path / "clip")
    rows = [{"image": picture} for picture in pictures]
    features = picture_features(rows, [0, 2], str(tmp_path / "clip"), tmp_path / "kept" / "f.pt", batch_size=1)
    assert features.shape == (2, 16)
    again = picture_features(rows, [0, 2], "no such encoder", tmp_path / "kept" / "f.pt")
    assert torch.equal(features, again)


def test_rows_under_our_names(tmp_path):
    vqa = [{"question_id": 7, "image": RED, "question": "Red?", "answers": [{"answer": "yes"}, {"answer": "no"}]}]
    row = Rows(str(write_parquet(tmp_path / "vqa.parquet", vqa)), "test", "vqa")[0]
    assert (row["number"], row["id"], row["question"], row["answers"]) == (0, 7, "Red?", ["yes", "no"])
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)

    # a name that two of ours may have
    single = [{"image": "r.png", "question": "Red?", "answer": "yes"}]
    RED.save(tmp_path / "r.png")
    row = Rows(str(write_parquet(tmp_path / "single.parquet", single)), "test", "vqa", image_dir=str(tmp_path))[0]
    assert row["answers"] == ["yes"]

    (tmp_path / "img").mkdir()
    BLUE.save(tmp_path / "img" / "1.png")
    memes = tmp_path / "memes.jsonl"
    memes.write_text(json.dumps({"id": 1, "img": "1.png", "ocr_text": "hm", "label": 1}) + "\n")
    rows = Rows(str(memes), "test", "hateful_memes", image_dir=str(tmp_path / "img"), columns={"text": "ocr_text"})
    assert rows[0]["text"] == "hm" and rows[0]["image"].getpixel((0, 0)) == (0, 0, 255)
    # as the set is published: paths from the folder of the file
    published = {"id": 1, "img": "img/1.png", "text": "hm", "label": 1}
    memes.write_text(json.dumps(published) + "\n")
    assert Rows(str(memes), "test", "hateful_memes")[0]["image"].getpixel((0, 0)) == (0, 0, 255)
    memes.write_text(json.dumps({"id": 1, "img": "1.png", "ocr_text": "hm", "label": 1}) + "\n")
    with pytest.raises(ValueError, match="no column for 'text'; it has id, img, ocr_text, label"):
        Rows(str(memes), "test", "hateful_memes", image_dir=str(tmp_path / "img"))


@pytest.mark.parametrize("start, end", [(4, 60), (-60, None)])
def test_damaged_rows_are_told_by_their_file(tmp_path, start, end):
    rows = [{"image": RED, "question": "a?", "answers": ["x" * 100]}]
    content = bytearray(write_parquet(tmp_path / "good.parquet", rows).read_bytes())
    content[start:end] = b"" if end is None else bytes(end - start)
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="bad.parquet cannot be read: "):
        Rows(str(tmp_path / "bad.parquet"), "test", "vqa")


@pytest.mark.parametrize("source", ["x.arrow", "."])
def test_arrow_files_are_looked_at_before_they_are_read(tmp_path, monkeypatch, source):
    """A file or those of a folder: with damaged places datasets would end the process."""

    def refuse(path):
        raise pa.ArrowInvalid(f"{path.name} has bad places")

    (tmp_path / "x.arrow").write_bytes(b"")
    monkeypatch.setattr("otter_hf.evaluation.data_sources.open_arrow_file", refuse)
    with pytest.raises(ValueError, match="cannot be read: x.arrow has bad places"):
        Rows(str(tmp_path / source), "test", "vqa")


class Asked:
    def __init__(self, processor):
        self.processor = processor


def render(processor, prompts, template, row) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompts.ask(row)}]}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    messages.append(messages[0])
    return processor.apply_chat_template(messages, chat_template=template, add_generation_prompt=True)


def test_prompts_are_those_of_2023(processor):
    row = {"question": "Is it?", "text": "words"}
    otter = Asked(processor)
    assert render(processor, *prompts_for(otter, "vqa"), row) == (
        "<image>User: Is it? Please answer in short words. GPT:<answer> yes<|endofchunk|>"
        "<image>User: Is it? Please answer in short words. GPT:<answer>"
    )
    hateful = "<image>is an image with: 'words' written on it. Is it hateful? Answer:"
    assert render(processor, *prompts_for(otter, "hateful_memes"), row) == f"{hateful}yes<|endofchunk|>{hateful}"
    assert not prompts_for(otter, "caption")[0].text_only_zero_shot

    processor.chat_template = None  # as Flamingo's has none
    prompts, template = prompts_for(otter, "vqa")
    assert template == FLAMINGO_TEMPLATE and prompts.text_only_zero_shot
    question = "<image>Question:Is it? Short answer:"
    assert render(processor, prompts, template, row) == f"{question}yes<|endofchunk|>{question}"
    assert prompts_for(object(), "caption")[0].ask(row) == "What does the image describe?"
