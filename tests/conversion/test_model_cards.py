"""The model cards: generated, complete, and free of figures that nobody computed."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from otter_hf.prompts import render
from otter_hf.testing import otterhd as otterhd_tiny


FOLDER = Path(__file__).resolve().parents[2] / "model_cards"
SPEC = importlib.util.spec_from_file_location("make_cards", FOLDER / "make_cards.py")
make_cards = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_cards)
CARDS = make_cards.all_cards()
MODELS = {
    "MPT1B-RPJama-Init",
    "OTTER-9B-INIT",
    "OTTER-Image-LLaMA7B",
    "OTTER-Image-MPT7B",
    "OTTER-MPT7B-Init",
    "OTTER-Video-LLaMA7B-DenseCaption",
    "OpenFlamingo-3B",
    "OpenFlamingo-4B",
    "OpenFlamingo-9B",
    "OtterHD-8B",
}


def test_there_is_a_card_for_every_model():
    assert set(CARDS) == {f"{model}.md" for model in MODELS}


@pytest.mark.parametrize("filename", CARDS)
def test_card_is_up_to_date(filename):
    assert (FOLDER / filename).read_text(encoding="utf-8") == CARDS[filename], "run model_cards/make_cards.py"


@pytest.mark.parametrize("filename", CARDS)
def test_card_is_complete(filename):
    card = CARDS[filename]
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["pipeline_tag"] == "image-text-to-text"
    for section in ("Made from", "Prompt", "Licences of the parts", "Known defects", "Memory", "Use"):
        assert f"\n## {section}\n" in body
    assert "import otter_hf" in body


def test_memory_agrees_with_the_published_files():
    # the four shards of OTTER-Image-LLaMA7B-LA-InContext have 9.94 + 9.84 + 9.77 + 3.34 GB
    total = int(re.search(r"\| total \| ([\d,]+) \|", CARDS["OTTER-Image-LLaMA7B.md"])[1].replace(",", ""))
    assert 4 * total / 1e9 == pytest.approx(9.94 + 9.84 + 9.77 + 3.34, abs=0.02)


@pytest.mark.parametrize("filename", CARDS)
def test_the_prompt_is_what_the_template_writes(filename, processor):
    """The templates of the processors, for one picture and a question; OpenFlamingo has no template."""
    card = CARDS[filename]
    shown = re.search(r"## Prompt\n\n```\n(.*?)\n```", card, re.DOTALL)[1]
    if "User:" not in shown:
        assert shown == "<image>{text}<|endofchunk|>"
        return
    is_otterhd = "fuyu" in card.split("---")[1]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{question}"}]}]
    if is_otterhd:
        processor = otterhd_tiny.tiny_processor()
    written = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert shown == written.replace("|SPEAKER|", "").replace("\x04", "<0x04>")
    # and the trained form, which the notes show
    trained = render([("{question}", "{answer}")], "fuyu" if is_otterhd else "simple", "none")
    assert f"`{trained}`".replace("\x04", "<0x04>") in card
