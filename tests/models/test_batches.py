"""
A row gives the same whatever is beside it: random batches of all families, padded on either side and packed, against
their rows one by one, in logits, loss, gradients and greedy tokens.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor, OtterForConditionalGeneration, OtterProcessor
from otter_hf.models.media_attention import running_media_index
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# a row: its media, each with its number of frames and of the letters in front of it, and the letters behind them
FRAMES = st.sampled_from([1, 1, 16]) | st.integers(1, 20)
ROW = st.tuples(st.lists(st.tuples(FRAMES, st.integers(0, 9)), max_size=4), st.integers(1, 12))
BATCHES = st.tuples(st.lists(ROW, min_size=2, max_size=4), st.sampled_from(["left", "right"]))


def noise(width: int, height: int, *seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8"))


def text_of(row, placeholder: str) -> str:
    media, length = row
    return "".join("ab"[i % 2] * letters + placeholder for i, (_, letters) in enumerate(media)) + "c" * length


class Flamingo:
    """Pictures, and films of up to 20 frames."""

    classes = FlamingoProcessor, FlamingoForConditionalGeneration

    def __init__(self):
        processor_class, model_class = self.classes
        self.processor = otter_tiny.tiny_processor(processor_class)
        self.model = otter_tiny.tiny_model(self.processor, model_class)

    def inputs(self, rows, side="left"):
        films = [[[noise(28, 28, i, n, k) for k in range(n)] for i, (n, _) in enumerate(media)] for media, _ in rows]
        texts = [text_of(row, "<image>") for row in rows]
        return self.processor(text=texts, videos=films, padding_side=side, return_tensors="pt")

    def packed_media(self, batch, real):
        seen = running_media_index(batch["input_ids"] == self.processor.image_token_id)  # (B, L)
        before = torch.nn.functional.pad(seen[:, -1].cumsum(0)[:-1], (1, 0))  # (B,)
        media = {"media_index": torch.where(seen > 0, seen + before[:, None], 0)[real][None]}
        there = batch["pixel_attention_mask"].any(dim=-1)  # (B, T)
        if there.any():
            media |= {name: batch[name][there][None] for name in ("pixel_values", "pixel_attention_mask")}
        return media


class Otter(Flamingo):
    classes = OtterProcessor, OtterForConditionalGeneration


class OtterHD:
    """Pictures, of as many sizes as there are numbers of frames."""

    def __init__(self):
        self.processor = otterhd_tiny.tiny_processor()
        self.model = otterhd_tiny.tiny_model(self.processor)

    def inputs(self, rows, side="left"):
        pictures = [
            [noise(10 + n * 17 % 70, 10 + n * 13 % 50, i, n) for i, (n, _) in enumerate(media)] for media, _ in rows
        ]
        texts = [text_of(row, "|SPEAKER|") for row in rows]
        return self.processor(text=texts, images=pictures, padding_side=side, return_tensors="pt")

    def packed_media(self, batch, real):
        return {"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {}


def pack(family, batch) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"].bool()
    positions = torch.cat([torch.arange(length) for length in real.sum(dim=1).tolist()])
    return {
        "input_ids": batch["input_ids"][real][None],
        "position_ids": positions[None],
        **family.packed_media(batch, real),
    }


def labels_of(batch) -> torch.Tensor:
    """Every token but the first of each row, which nothing predicts."""
    mask = batch["attention_mask"]
    return batch["input_ids"].masked_fill((mask == 0) | (mask.cumsum(dim=1) == 1), -100)


def learn(model, inputs, labels, count: int):
    """Loss and gradients, as parts of a mean over `count` labels."""
    model.zero_grad()
    output = model(**inputs, labels=labels, num_items_in_batch=count)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), output.loss.item(), gradients


def check(family, rows, side):
    model, batch = family.model, family.inputs(rows, side)
    alone = [family.inputs([row]) for row in rows]
    count = sum(int((labels_of(row) != -100).sum()) for row in alone)
    logits, loss, gradients = [], 0.0, {}
    for row in alone:
        row_logits, row_loss, row_gradients = learn(model, row, labels_of(row), count)
        logits.append(row_logits[0])
        loss += row_loss
        gradients = {
            name: gradients.get(name, 0) + row_gradients.get(name, 0) for name in {*gradients, *row_gradients}
        }
    real = batch["attention_mask"].bool()
    packed_labels = labels_of(batch)[real][None]
    for inputs, labels in ((batch, labels_of(batch)), (pack(family, batch), packed_labels)):
        got_logits, got_loss, got_gradients = learn(model, inputs, labels, count)
        got_logits = got_logits[real] if labels.shape == real.shape else got_logits[0]
        torch.testing.assert_close(got_logits, torch.cat(logits), atol=1e-4, rtol=1e-4)
        assert got_loss == pytest.approx(loss, abs=1e-4, rel=1e-4)
        for name, expected in gradients.items():
            got = got_gradients.get(name, torch.zeros(()))
            torch.testing.assert_close(got.expand_as(expected), expected, atol=1e-4, rtol=1e-4, msg=name)
    if side == "left":
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        tokens = model.generate(**batch, **settings)[:, real.shape[1] :]
        expected = [model.generate(**row, **settings)[0, row["input_ids"].shape[1] :] for row in alone]
        assert tokens.tolist() == [row.tolist() for row in expected]


@pytest.mark.parametrize("examples", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make_family", [Flamingo, Otter, OtterHD])
def test_a_row_does_not_depend_on_its_neighbours(make_family, examples):
    family = make_family()

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.example(([([(16, 2)], 3), ([(1, 0)], 3), ([], 5), ([(1, 1), (3, 0), (1, 4)], 2)], "left"))
    @hypothesis.given(BATCHES)
    def run(batch):
        check(family, *batch)

    run()
