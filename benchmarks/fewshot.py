"""Few-shot evaluation beside this project at a commit before, and a training epoch from the media store.

    OMP_NUM_THREADS=2 python benchmarks/fewshot.py      # about fifteen minutes on two cores

Random weights, float32: the 79M Otter on Llama of `decoding.py` (width 512, 8 layers) behind a processor whose tokens
are words, asked by `otter_hf.evaluation.model.ConversationModel`, as `otter-hf eval` does; the peer is the package at
59969af, before anything of a picture or text was kept. Both read the same folder; their replies are compared.

Questions: 5 to 9 words and a picture of 256 x 256 each, all different, behind 8 worked examples, the same for all or
drawn for each from 100; 5 new tokens, 3 beams (as OpenFlamingo answers VQA) or greedy; 16 rows a batch on both sides.
Each repeat is a run of its own over 200 questions, or 48 where examples are drawn; the store of latents is empty at
first. Two rows, of 32 questions, beside the loop of open_flamingo 2.0.1 with its own model of these sizes (its
resampler has six layers, ours two), where PARITY_CACHE has the environment of `tests/parity_2023/run.sh`; its figures
are its own.
Ranking: 1,000 class names of 1 to 3 words for each of 2 pictures.
Training: a frozen CLIP ViT-B/32, resampler and gated blocks trained, an epoch of 24 rows with a picture of 224 x 224
each in batches of 4; ours reads the tower's features from files, the peer, this build, encodes every picture.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from _common import Side, check_out, compare, report
from PIL import Image


PEER_COMMIT = "59969af"
# to try it out, FIXED=4 DRAWN=4 FEW=4 CLASSES=20 ROWS=4 in the environment
SIZES = {"FIXED": 200, "DRAWN": 48, "FEW": 32, "CLASSES": 1000, "ROWS": 24}
FIXED, DRAWN, FEW, CLASSES, ROWS = (int(os.environ.get(name, size)) for name, size in SIZES.items())
SHOTS, POOL, BATCH, WORDS = 8, 100, 16, 4000
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<|endofchunk|>{% endif %}{% endfor %}"
)


def make_processor(side: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

    from otter_hf import FlamingoProcessor

    words = ["<s>", "</s>", "<unk>", "<|endofchunk|>", "<image>", "Question:", "Answer:", "Output:"]
    words += [f"w{number}" for number in range(WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    size = {"height": side, "width": side}
    images = CLIPImageProcessorPil(size=size, do_center_crop=False)
    return FlamingoProcessor(images, FlamingoProcessor.prepare_tokenizer(tokenizer), chat_template=TEMPLATE)


def write_model(folder: Path) -> None:
    import decoding

    processor = make_processor(56)
    model = decoding.make_ours()
    model.config.image_token_id, model.config.end_of_chunk_token_id = 4, 3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def words(random: Random, least: int, most: int) -> str:
    return " ".join(f"w{random.randrange(WORDS)}" for _ in range(random.randint(least, most)))


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((256, 256))


def turns(number: int, shown: Image.Image, answer: str | None) -> list[dict]:
    text = f" Question: {words(Random(number), 5, 9)} Answer:"
    messages = [{"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": text}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": f" {answer} "}]})
    return messages


# examples, questions
KINDS = {
    "fixed": ("the same", FIXED),
    "drawn": ("drawn", DRAWN),
    "few, fixed": ("the same", FEW),
    "few, drawn": ("drawn", FEW),
}


def make_questions(kind: str) -> list[list[dict]]:
    examples, count = KINDS[kind]
    random, pool = Random(0), [picture(number) for number in range(POOL)]
    questions = []
    for question in range(count):
        shots = random.sample(range(POOL), SHOTS) if examples == "drawn" else range(SHOTS)
        messages = [message for n in shots for message in turns(n, pool[n], words(Random(n), 1, 2))]
        questions.append(messages + turns(POOL + question, picture(POOL + question), None))
    return questions


def make_workloads(folder: str) -> dict:
    """Function of each workload, by its name."""
    from otter_hf.evaluation.model import ConversationModel

    model = ConversationModel(folder, dtype="float32", device="cpu")
    questions = {kind: make_questions(kind) for kind in KINDS}
    classes = [words(Random(f"class {number}"), 1, 3) for number in range(CLASSES)]
    is_new = hasattr(model, "answers")

    def start_anew():
        if is_new:  # the peer keeps nothing
            model.media = type(model.media)(model.model)
            model._batches = type(model._batches)(model.model, model.processor.tokenizer.pad_token_id, model.media)

    def ask(kind: str, beams: int) -> list[str]:
        start_anew()
        asked, options = questions[kind], {"max_new_tokens": 5, "num_beams": beams, "length_penalty": 0.0}
        if is_new:
            return model.generate(asked, batch_size=BATCH, **options)
        batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        return [answer for batch in batches for answer in model.generate(batch, **options)]

    def rank() -> list[float]:
        start_anew()
        conversations = [turns(number, picture(number), None) for number in range(2)]
        return [total for one in conversations for total, *_ in model.log_likelihood(one, classes, BATCH)]

    kinds = {f"{kind}, {beams}": lambda kind=kind, beams=beams: ask(kind, beams) for kind, beams in (*ASKED, *BESIDE)}
    questions["first"] = questions["few, fixed"][:2]
    return {**kinds, "ranking": rank, "first, 1": lambda: ask("first", 1)}


ASKED = [("fixed", 3), ("fixed", 1), ("drawn", 3), ("drawn", 1)]
BESIDE = [("few, fixed", 3), ("few, drawn", 3)]
NAMES = {"the same": "the same examples for all", "drawn": f"examples drawn from {POOL}"}


def work(folder: str) -> None:
    workloads = make_workloads(folder)
    for line in sys.stdin:
        print(json.dumps(workloads[line.strip()]()), flush=True)


def describe(kind: str) -> str:
    if kind == "ranking":
        return f"{CLASSES} classes ranked for 2 pictures"
    kind, beams = kind.rsplit(", ", 1)
    examples, count = KINDS[kind]
    return f"{count} questions behind {SHOTS} examples, {NAMES[examples]}, {beams} beam{'s' * (beams != '1')}"


def told(row: dict) -> dict:
    """The row, which is told as it comes: all of them take their time."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def beside_peer(repeats: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        sources = [Path(__file__).resolve().parent.parent / "src", check_out(PEER_COMMIT, folder)]
        sides = [Side(__file__, source, arguments=(f"{folder}/model",)) for source in sources]
        said = [None, None]

        def run(side: int, kind: str) -> None:
            said[side] = sides[side].run(kind)

        for side in range(2):
            run(side, "first, 1")  # which reads the model and wakes the threads
        for kind in [f"{kind}, {beams}" for kind, beams in ASKED] + ["ranking"]:
            calls = (partial(run, side, kind) for side in range(2))
            row = compare(describe(kind), *calls, repeats, is_warm=True)
            if kind == "ranking":
                same = torch.allclose(*(torch.tensor(totals) for totals in said), atol=1e-3)
            else:
                same = said[0] == said[1]
            if not same:
                raise SystemExit(f"{describe(kind)}: the two sides do not say the same.")
            rows.append(told(row | {"replies": len(said[0])}))
        for side in sides:
            side.close()
    return rows


def beside_open_flamingo(repeats: int) -> list[dict]:
    """With three beams, as it asks; only where its environment is."""
    python = Path(os.environ.get("PARITY_CACHE", Path.home() / ".cache" / "otter-hf-parity-2023")) / "venv/bin/python"
    if not python.is_file():
        print(f"There is no {python}: open_flamingo is left out.", file=sys.stderr)
        return []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        ours = Side(__file__, arguments=(f"{folder}/model",))
        peer = Side(str(Path(__file__).with_name("_open_flamingo.py")), python=str(python))
        for side in (ours, peer):
            side.run("first, 1")
        for kind in (f"{kind}, {beams}" for kind, beams in BESIDE):
            calls = [lambda side=side, kind=kind: side.run(kind) for side in (ours, peer)]
            name = f"{describe(kind)}; the loop of open_flamingo 2.0.1, its model and weights"
            rows.append(told(compare(name, *calls, repeats, is_warm=True)))
        ours.close(), peer.close()
    return rows


def epochs(repeats: int) -> dict:
    from otter_hf import FlamingoConfig, FlamingoForConditionalGeneration
    from otter_hf.training.features import store_media

    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32, "hidden_size": 768}
    vision |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    text |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = FlamingoConfig(text_config=text, vision_config=vision, cross_attn_every_n_layers=2, image_token_id=4095)
    config.cross_attn_gate_init = 1.0
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 1, 1, 3, 224, 224, generator=generator)
    ids = torch.randint(3, 4095, (ROWS, 64), generator=generator)
    ids[:, 0] = 4095

    def make(folder: str | None) -> FlamingoForConditionalGeneration:
        torch.manual_seed(0)
        model = FlamingoForConditionalGeneration(config)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("perceiver" in name or "gated" in name)
        if folder is not None:
            store_media(model.model, folder)
        return model.train()

    def epoch(model) -> list[float]:
        losses = []
        for start in range(0, len(ids), 4):
            rows = slice(start, start + 4)
            loss = model(input_ids=ids[rows], pixel_values=pixels[rows], labels=ids[rows]).loss
            loss.backward()
            losses.append(loss.item())
        return losses

    with tempfile.TemporaryDirectory() as folder:
        stored, plain = make(folder), make(None)
        epoch(stored)  # which writes the files
        difference = max(abs(a - b) for a, b in zip(epoch(stored), epoch(plain), strict=True))
        if difference > 1e-5:
            raise SystemExit(f"From the store the losses differ by {difference}.")
        return compare(
            f"training, second epoch of {ROWS} pictures from the store",
            lambda: epoch(stored),
            lambda: epoch(plain),
            repeats,
            is_warm=True,
            largest_difference_of_losses=difference,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.folder)
        return
    rows = [*beside_peer(args.repeats), *beside_open_flamingo(args.repeats), epochs(args.repeats)]
    report("fewshot", f"this project at {PEER_COMMIT}; in training, this build without the store", rows)


if __name__ == "__main__":
    main()
