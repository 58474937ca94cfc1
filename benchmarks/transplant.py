"""
Is a transplant worth it: resampler and gated blocks of a trained Otter on another decoder, beside a random start.

    OMP_NUM_THREADS=2 python benchmarks/transplant.py --model out/demo/model      # after `make demo`

Pictures are easy-VQA's, and its open questions (what shape, what colour); the vision tower is that of the demo's
model, frozen everywhere. Decoders are trained on text alone first (three questions of four with a sentence in front
that tells the answer, as language models know how to read), and frozen then, as in the training of Otter. Source: a
Llama of width 64 and 4 layers, whose resampler and gated blocks learn for 600 steps. Targets: a Llama of width 96 and
6 layers, and an MPT of width 48 and 4 layers with a smaller tokenizer of its own. Each has two gated blocks.

Starts, trained on the same batches at two rates with frozen decoder and tower:
    random        resampler and gated blocks at random
    resampler     the resampler is the source's
    latents       so are keys and values of the gated blocks, which come of the latents: their width is the same
    all           so is the rest of the blocks, through maps between the states of both decoders in front of them,
                  fitted by ridge regression on 2,000 texts: from target to source before what reads them (queries,
                  feed-forward), from source to target behind what writes them
An answer is right if the likeliest token is the true one at each of its places and at its end, which is when greedy
decoding gives it to the letter. Controls: each question about another picture, and each question's commonest answer.
"""

import argparse
import copy
import itertools
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import easy_vqa
import torch
from _common import report, summary
from PIL import Image
from torch import nn
from transformers import AutoProcessor, LlamaConfig

from otter_hf import OtterConfig, OtterForConditionalGeneration, OtterMptConfig, OtterProcessor
from otter_hf.data import render


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from end_to_end import easy_vqa_script, kinds_of  # noqa: E402


STEPS = (10, 25, 50, 100, 200)
STARTS = ("random", "resampler", "latents", "all")
TEXT_RATE, RATES = 3e-3, (1e-3, 3e-3)
PICTURES, BATCH, TEXT_STEPS, SOURCE_STEPS = 1500, 32, 300, 600
RIDGE = 1e-3  # of the mean variance


class Questions:
    """Questions of a split with `features (N, v, D)` of their pictures, and what their texts say."""

    def __init__(self, questions, paths: dict[int, str], model, processor):
        self.rows = list(zip(*questions, strict=True))  # (question, answer, picture)
        self.kinds = {picture: kind for picture, kind in kinds_of(questions).items() if picture in paths}
        self.rows = [row for row in self.rows if row[2] in self.kinds and row[1] not in ("yes", "no")]
        pictures = sorted(self.kinds)
        self.place = {picture: place for place, picture in enumerate(pictures)}
        features = []
        with torch.no_grad():
            for start in range(0, len(pictures), 256):
                images = [Image.open(paths[picture]).convert("RGB") for picture in pictures[start : start + 256]]
                pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
                features.append(model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2))
        self.features = torch.cat(features)

    def text(self, row, told: bool) -> str:
        question, answer, picture = row
        sentence = "there is a {} {}. ".format(*self.kinds[picture]) if told else ""
        return sentence + render([(question, answer)], "simple", [1])


def encode(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(N, L)` and labels, the same with -100 everywhere but behind `<answer>`."""
    tokenizer.padding_side = "right"
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    started = (ids == tokenizer.convert_tokens_to_ids("<answer>")).cumsum(1)
    is_answer = (started.roll(1, 1) > 0) & (started > 0) & (ids != tokenizer.pad_token_id)
    is_answer &= ids != tokenizer.convert_tokens_to_ids("<answer>")
    return ids, ids.where(is_answer, -100)


def make_otter(demo: OtterConfig, text_config, every: int, tokenizer, seed: int) -> OtterForConditionalGeneration:
    """The demo's tower configuration and new parts, on another decoder that images leave as it is without them."""
    torch.manual_seed(seed)
    shape = {name: value for name, value in demo.to_dict().items() if name.startswith(("perceiver_", "cross_attn_"))}
    shape |= {"cross_attn_every_n_layers": every, "cross_attn_on_text": False, "initializer_range": 0.05}
    config = OtterConfig(
        vision_config=copy.deepcopy(demo.vision_config),
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **shape,
    )
    return OtterForConditionalGeneration(config).eval()


def llama(width: int, layers: int, tokenizer) -> LlamaConfig:
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 16}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.1, **shape, **heads)


def mpt(width: int, layers: int, tokenizer) -> OtterMptConfig:
    return OtterMptConfig(
        vocab_size=len(tokenizer), d_model=width, n_layers=layers, n_heads=width // 16, initializer_range=0.1
    )


# function of the configuration, width, layers
DECODERS = {
    "source": (llama, 64, 4),
    "sibling": (llama, 64, 4),  # the source's shape, other weights
    "wider": (llama, 96, 6),
    "mpt": (mpt, 48, 4),
}


def blocks(model) -> list[nn.Module]:
    found = [layer.gated_cross_attn_layer for layer in model.model.decoder_layers]
    return [block for block in found if block is not None]


def optimise(parameters, losses, rate: float, warmup: int = 20):
    """One step of AdamW for each loss of a generator; yields the number of steps done."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    for step, loss in enumerate(losses, 1):
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.param_groups[0]["lr"] = rate * min(1.0, step / warmup)
        optimiser.step()
        optimiser.zero_grad()
        yield step


def train_on_text(model, tokenizer, questions: Questions, seed: int) -> None:
    """The decoder learns the texts, half of which tell what is in the picture; then it is frozen."""
    generator = random.Random(seed)
    model.requires_grad_(False)
    decoder = [model.model.language_model, model.lm_head]
    parameters = {id(p): p for part in decoder for p in part.parameters()}
    of_blocks = {id(p) for block in blocks(model) for p in block.parameters()}
    parameters = [p.requires_grad_() for key, p in parameters.items() if key not in of_blocks]

    def losses():
        for _ in range(TEXT_STEPS):
            rows = generator.sample(questions.rows, BATCH)
            ids, labels = encode(tokenizer, [questions.text(row, generator.random() < 0.75) for row in rows])
            logits = model(input_ids=ids, media_index=torch.zeros_like(ids), use_cache=False).logits[:, :-1]
            each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            # most of a text is the question, most of what there is to learn the answer
            yield each[ids[:, 1:] != tokenizer.pad_token_id].mean() + each[labels[:, 1:] >= 0].mean()

    yield from optimise(parameters, losses(), TEXT_RATE)


def train(model, tokenizer, questions: Questions, rate: float, num_steps: int, seed: int):
    """Resampler and gated blocks learn to answer; yields the number of steps done."""
    generator = random.Random(seed)
    parts = [model.model.perceiver, *blocks(model)]
    parameters = [parameter.requires_grad_() for part in parts for parameter in part.parameters()]

    def losses():
        for _ in range(num_steps):
            rows = generator.sample(questions.rows, BATCH)
            ids, labels = encode(tokenizer, [questions.text(row, False) for row in rows])
            pictures = torch.tensor([questions.place[row[2]] for row in rows])
            yield model(
                input_ids=ids, image_hidden_states=latents(model, questions.features[pictures]), labels=labels
            ).loss

    return optimise(parameters, losses(), rate)


def latents(model, features: torch.Tensor) -> torch.Tensor:
    """`(B, v, D)` -> `(B, 1, n, D)`."""
    return model.model.perceiver(features[:, None])[:, None]


@torch.no_grad()
def accuracy(model, tokenizer, questions: Questions, rows: list, shift: int = 0, told: bool | None = None) -> float:
    """Of `rows`, about the picture of the row `shift` places on; with `told`, from the text and without pictures."""
    right = []
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        ids, labels = encode(tokenizer, [questions.text(row, bool(told)) for row in part])
        if told is None:
            others = [rows[(start + i + shift) % len(rows)] for i in range(len(part))]
            pictures = torch.tensor([questions.place[row[2]] for row in others])
            media = {"image_hidden_states": latents(model, questions.features[pictures])}
        else:
            media = {"media_index": torch.zeros_like(ids)}
        chosen = model(input_ids=ids, **media, use_cache=False).logits.argmax(-1)[:, :-1]
        right.append(((chosen == labels[:, 1:]) | (labels[:, 1:] < 0)).all(1))
    return round(torch.cat(right).float().mean().item(), 4)


@torch.no_grad()
def block_inputs(model, tokenizer, texts: list[str]) -> tuple[list[torch.Tensor], list[dict[int, int]]]:
    """States `(N, L, width)` in front of each gated block, and of each text the place of the token that ends where."""
    found, hooks = [], []
    for block in blocks(model):
        hooks.append(block.register_forward_pre_hook(lambda module, args: found.append(args[0])))
    ids, _ = encode(tokenizer, texts)
    model(input_ids=ids, media_index=torch.zeros_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    offsets = tokenizer(texts, return_offsets_mapping=True)["offset_mapping"]
    return found, [{end: i for i, (_, end) in enumerate(row) if end} for row in offsets]


def matched_states(source, target, texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each pair of blocks the states `(M, width)` of both models at the letters where tokens of both end."""
    (ours, our_ends), (theirs, their_ends) = (block_inputs(*side, texts) for side in (source, target))
    pairs = [
        (row, a[end], b[end])
        for row, (a, b) in enumerate(zip(our_ends, their_ends, strict=True))
        for end in a.keys() & b.keys()
    ]
    row, a, b = torch.tensor(pairs).unbind(1)
    return [(one[row, a], other[row, b]) for one, other in zip(ours, theirs, strict=True)]


def fit(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the ridge regression of `y (M, n)` on `x (M, m)`."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean)).T
    return weight, y_mean - weight @ x_mean


def explained(x, y, weight, bias) -> float:
    return round(1 - ((y - x @ weight.T - bias).var(0).sum() / y.var(0).sum()).item(), 3)


@torch.no_grad()
def transplant(source, target, start: str, questions: Questions) -> list[float]:
    """Move parts of `source` into `target`, both a model with its tokenizer; how well the maps fit, by block."""
    ours, theirs = source[0], target[0]
    if start == "random":
        return []
    theirs.model.perceiver.load_state_dict(ours.model.perceiver.state_dict())
    if start == "resampler":
        return []
    for block, of_source in zip(blocks(theirs), blocks(ours), strict=True):
        block.attn.to_kv.weight.copy_(of_source.attn.to_kv.weight)
    if start == "latents":
        return []
    generator = random.Random(1)
    texts = [questions.text(row, generator.random() < 0.5) for row in generator.sample(questions.rows, 2500)]
    fits = []
    for block, of_source, (a, b) in zip(
        blocks(theirs), blocks(ours), matched_states(source, target, texts[:2000]), strict=True
    ):
        # of a feed-forward layer's units a narrower target gets those that write most; units too many write nothing
        (of_norm, of_first, _, of_last), (norm, first, _, last) = of_source.feed_forward, block.feed_forward
        units = of_last.weight.norm(dim=0).topk(min(len(first.weight), len(of_first.weight))).indices
        readings = of_source.attn.to_q(of_source.attn.norm(a)), of_first(of_norm(a))[:, units]
        for normed, reader, reading in zip((block.attn.norm, norm), (block.attn.to_q, first), readings, strict=True):
            weight, bias = fit(nn.functional.layer_norm(b, b.shape[-1:]), reading)
            reader.weight[: len(weight)] = weight
            normed.weight.fill_(1.0)
            normed.bias.copy_(torch.linalg.lstsq(weight, bias[:, None], driver="gelsd").solution[:, 0])
        weight, bias = fit(a, b)
        block.attn.to_out.weight.copy_(weight @ of_source.attn.to_out.weight)
        last.weight.zero_()[:, : len(units)] = weight @ of_last.weight[:, units]
        block.attn_gate.copy_(of_source.attn_gate)
        block.ff_gate.copy_(of_source.ff_gate)
        fits.append((weight, bias))
    held_out = matched_states(source, target, texts[2000:])
    return [explained(a, b, *of_block) for (a, b), of_block in zip(held_out, fits, strict=True)]


class Bench:
    """Pictures, questions, tokenizers, and the decoders and sources, which are kept in `folder`."""

    def __init__(self, demo_folder: Path, folder: Path, num_test: int):
        self.folder = folder
        self.demo = OtterForConditionalGeneration.from_pretrained(demo_folder).eval().requires_grad_(False)
        processor = AutoProcessor.from_pretrained(demo_folder)
        pictures = easy_vqa.get_train_image_paths()
        self.known = Questions(
            easy_vqa.get_train_questions(), dict(sorted(pictures.items())[:PICTURES]), self.demo, processor
        )
        self.asked = Questions(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), self.demo, processor)
        self.test = random.Random(1).sample(self.asked.rows, num_test)
        words = processor.tokenizer
        texts = [self.known.text(row, True) for row in self.known.rows]
        pieces = easy_vqa_script("build_tiny_otter").train_tokenizer(texts, vocab_size=300)
        pieces = OtterProcessor.prepare_tokenizer(pieces)
        self.tokenizers = {name: pieces if name == "mpt" else words for name in DECODERS}

    def accuracy(self, name: str, model, **how) -> float:
        return accuracy(model, self.tokenizers[name], self.asked, self.test, **how)

    def new(self, name: str, seed: int) -> OtterForConditionalGeneration:
        make, width, layers = DECODERS[name]
        tokenizer = self.tokenizers[name]
        return make_otter(self.demo.config, make(width, layers, tokenizer), layers // 2, tokenizer, seed)

    def kept(self, name: str, make):
        """The model of `folder / name`, made if it is not there."""
        if not (self.folder / name / "model.safetensors").is_file():
            make().save_pretrained(self.folder / name)
        return OtterForConditionalGeneration.from_pretrained(self.folder / name).eval().requires_grad_(False)

    def decoder(self, name: str):
        """The Otter `name` whose decoder was trained on text, all else at random."""

        def make():
            seed = int(name != "source")
            model = self.new(name, seed)
            for _ in train_on_text(model, self.tokenizers[name], self.known, seed):
                pass
            return model

        return self.kept(name, make)

    def source(self):
        def make():
            model = self.decoder("source")
            for _ in train(model, self.tokenizers["source"], self.known, 1e-3, SOURCE_STEPS, 0):
                pass
            return model

        return self.kept("trained_source", make)

    def start(self, name: str, source: tuple, start: str, seed: int):
        """A model of the decoder `name` with new parts of this seed or of `source`; and how well the maps fit."""
        model, decoder = self.new(name, 100 + seed), self.decoder(name)
        new = {key for key in model.state_dict() if ".gated_cross" in key or "perceiver" in key}
        model.load_state_dict(
            {key: value for key, value in decoder.state_dict().items() if key not in new}, strict=False
        )
        model.requires_grad_(False)
        return model, transplant(source, (model, self.tokenizers[name]), start, self.known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo/model"), help="the demo's trained model")
    parser.add_argument("--output", type=Path, default=Path("out/transplant"), help="keeps decoders and the source")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=500, help="test questions")
    parser.add_argument("--targets", nargs="+", default=["wider", "mpt"], choices=list(DECODERS))
    parser.add_argument("--starts", nargs="+", default=["random", "resampler", "all"], choices=STARTS)
    args = parser.parse_args()
    bench = Bench(args.model, args.output, args.test)
    commonest = defaultdict(Counter)
    for question, answer, _ in bench.known.rows:
        commonest[question][answer] += 1
    guessed = [commonest[question].most_common(1)[0][0] == answer for question, answer, _ in bench.test]
    model = bench.source()
    source = (model, bench.tokenizers["source"])
    rows = [
        {
            "source": bench.accuracy("source", model),
            "other_pictures": bench.accuracy("source", model, shift=1),
            "question_alone": round(sum(guessed) / len(guessed), 4),
        }
    ]
    print(rows[0], flush=True)
    for name in args.targets:
        decoder = bench.decoder(name)
        read = {key: bench.accuracy(name, decoder, told=told) for key, told in (("told", True), ("not_told", False))}
        for start, rate in itertools.product(args.starts, RATES):
            figures, fits = defaultdict(list), []
            for seed in range(args.seeds):
                model, fits = bench.start(name, source, start, seed)
                figures[0].append(bench.accuracy(name, model))
                for step in train(model, bench.tokenizers[name], bench.known, rate, STEPS[-1], seed):
                    if step in STEPS:
                        figures[step].append(bench.accuracy(name, model))
                figures["other_pictures"].append(bench.accuracy(name, model, shift=1))
            row = {"target": name, "decoder": read, "start": start, "rate": rate}
            row["accuracy"] = {str(step): summary(values, 4) for step, values in figures.items()}
            rows.append(row | ({"explained": fits} if fits else {}))
            print(rows[-1], flush=True)
    report("transplant", "a random start", rows)


if __name__ == "__main__":
    main()
