"""
What a trained model knows of the tasks of `prepare.py`, and what of it needs its pictures.

    python examples/real_parts/measure.py --model out/demo-real/model --untrained out/demo-real/untrained

Every question is decoded greedily. An answer counts if it is the true one to the letter; in front of a comma it may
say what it sees, as answers in the training data do. For each task:

    accuracy        of the questions about pictures that no training has seen
    question_only   the most frequent answer to each question in the training data
    swapped         the same questions, each about the pictures of the next one with others and another answer
    reversed        the same questions and pictures, with the order of two pictures or of the frames turned round
    shots_2, _4     the first questions again, after worked examples from the training data, with pictures of their own

`language` compares the trained model with the untrained one where no picture is given: the perplexity of what the
language model wrote itself, and its answers to 50 questions. Writes `metrics.json`, and `answers.png`.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path
from random import Random
from runpy import run_path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.data import MimicitMixture, SampleOptions, render
from otter_hf.training.features import store_media
from otter_hf.training.text_states import TextStateCache


# not by an import: its name is that of a package
_OF_EASY_VQA = run_path(str(Path(__file__).resolve().parents[1] / "easy_vqa" / "evaluate.py"))
accuracy, draw_answers = _OF_EASY_VQA["accuracy"], _OF_EASY_VQA["draw_answers"]

BATCH_SIZE = 50
NUM_FRAMES = 4
NUM_WITH_SHOTS = 16


def main(model_folder: Path, untrained: Path | None, data: Path, output: Path, limit: int | None = None) -> None:
    """Measures the model in `model_folder`; without `untrained`, not what became of its language."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    # as in training, features of frames are stored, of which every order and combination is made: not latents
    model.model.vision_tower.requires_grad_(False)
    store_media(model.model, output / "features")
    TextStateCache(model.requires_grad_(False))
    test, train = (read_tasks(data / f"{split}.yaml") for split in ("test", "train"))
    metrics, shown = {"tasks": {}}, []
    for name, samples in test.items():
        samples = samples if limit is None else [*samples][:limit]
        row, answers = measure_task(model, processor, [*samples], train[name], name)
        metrics["tasks"][name] = row
        print(f"{name}: {row}", flush=True)
        drawn = Random(0).sample(range(len(answers)), min(3, len(answers)))
        for i in drawn:
            shown.append((side_by_side(samples[i]), as_asked(samples[i]), what_counts(answers[i]), truth(samples[i])))
    metrics["parameters"] = model.num_parameters()
    output.mkdir(parents=True, exist_ok=True)
    draw_answers(shown, output)
    if untrained is not None:
        metrics["language"] = compare_language(
            AutoModelForImageTextToText.from_pretrained(untrained), model, processor
        )
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


def read_tasks(mixture: Path) -> dict[str, list[dict]]:
    """Name of a task -> its samples."""
    tasks = defaultdict(list)
    for sample in MimicitMixture(mixture, SampleOptions(num_frames=NUM_FRAMES)):
        tasks[sample["dataset"]].append(sample)
    return tasks


def measure_task(model, processor, samples: list[dict], train: list[dict], name: str) -> tuple[dict, list[str]]:
    """The figures of a task, and the whole answers about the right pictures."""
    truths = [truth(sample) for sample in samples]
    is_long = any("," in sample["turns"][-1][1] for sample in train)

    def reply(asked: list[dict], condition: str) -> list[str]:
        return answer(model, processor, asked, is_long, f"{name}, {condition}")

    def ask(asked: list[dict], condition: str) -> list[str]:
        return [what_counts(text) for text in reply(asked, condition)]

    answers = reply(samples, "test split")
    said = defaultdict(Counter)
    for sample in train:
        said[sample["turns"][-1][0]][truth(sample)] += 1
    majority = [
        said[question].most_common(1)[0][0] if said[question] else ""
        for question in (sample["turns"][-1][0] for sample in samples)
    ]
    row = {
        "accuracy": accuracy([*map(what_counts, answers)], truths),
        "question_only": accuracy(majority, truths),
        "swapped": accuracy(ask(swap_pictures(samples), "swapped pictures"), truths),
    }
    if num_pictures(samples[0]) > 1:
        row["reversed"] = accuracy(ask([turn_round(sample) for sample in samples], "reversed"), truths)
    generator = Random(0)
    first = samples[:: max(1, len(samples) // NUM_WITH_SHOTS)]
    for shots in (2, 4):
        asked = [with_shots(sample, generator.sample(train, shots)) for sample in first]
        row[f"shots_{shots}"] = accuracy(ask(asked, f"{shots} shots"), [truth(sample) for sample in first])
    row["questions"] = len(samples)
    return row, answers


def truth(sample: dict) -> str:
    return what_counts(sample["turns"][-1][1])


def what_counts(text: str) -> str:
    """An answer without what it says of the picture first."""
    return text.rpartition(",")[2].strip()


def as_asked(sample: dict) -> str:
    """The last question, with `<image>` where it had one."""
    question = sample["turns"][-1][0]
    for place in sorted(sample["media_places"][-1], reverse=True) if "media_places" in sample else ():
        before, after = question[:place], question[place:]
        question = f"{before}<image>{' ' if after[:1].isalnum() else ''}{after}"
    return question


def num_pictures(sample: dict) -> int:
    return sum(map(len, sample["media"]))


def swap_pictures(samples: list[dict]) -> list[dict]:
    """Each sample with the media of the next one that is about other media, and whose answer is another."""
    swapped = []
    for i, sample in enumerate(samples):
        others = (samples[(i + k) % len(samples)] for k in range(1, len(samples) + 1))
        fits = (o for o in others if o["media"] != sample["media"] and truth(o) != truth(sample))
        other = next(fits, sample)
        swapped.append({**sample, "media": other["media"]})
    return swapped


def turn_round(sample: dict) -> dict:
    """The last picture first: of a question with several, or of the frames of its medium."""
    return {**sample, "media": [medium[::-1] for medium in sample["media"][::-1]]}


def with_shots(sample: dict, examples: list[dict]) -> dict:
    """The question of a sample after those of others, each behind its own pictures."""
    parts = [*(first_turn(example) for example in examples), sample]
    joined = {
        "turns": [part["turns"][-1] for part in parts],
        "media": [medium for part in parts for medium in part["media"]],
        "media_per_turn": [len(part["media"]) for part in parts],
    }
    if "media_places" in sample:
        joined["media_places"] = [part["media_places"][-1] for part in parts]
    return joined


def first_turn(sample: dict) -> dict:
    places = {"media_places": sample["media_places"][:1]} if "media_places" in sample else {}
    return {**sample, "turns": sample["turns"][:1], "media_per_turn": sample["media_per_turn"][:1], **places}


@torch.inference_mode()
def answer(model, processor, samples: list[dict], is_long: bool, name: str) -> list[str]:
    """
    The greedy answers to the last questions of samples. Single questions come again and again: without a cache of keys
    and values what the lower layers make of them is known, see [`TextStateCache`], which pays where answers are short.
    """
    answers = []
    for start in tqdm(range(0, len(samples), BATCH_SIZE), desc=name, leave=False):
        batch = samples[start : start + BATCH_SIZE]
        texts = []
        for sample in batch:
            *earlier, (question, _) = sample["turns"]
            places = sample.get("media_places")
            texts.append(render([*earlier, (question, None)], "simple", sample["media_per_turn"], media_places=places))
        inputs = processor(text=texts, videos=[sample["media"] for sample in batch], return_tensors="pt")
        use_cache = is_long or max(len(sample["turns"]) for sample in batch) > 1
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        answers += processor.post_process_image_text_to_text(output)
    return answers


def side_by_side(sample: dict) -> Image.Image:
    """All pictures of a sample as one."""
    pictures = [frame.resize((112, 112)) for medium in sample["media"] for frame in medium]
    sheet = Image.new("RGB", (116 * len(pictures) - 4, 112), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (116 * i, 0))
    return sheet


_CAPITALS = "France Italy Spain Japan China India Egypt Russia Canada Brazil Greece Norway Poland Kenya Peru".split()
_OPPOSITES = "hot big fast old happy light open early strong wet good high full rich loud".split()


def text_questions() -> list[str]:
    """50 questions without a picture."""
    sums = [f"What is {a} plus {b}?" for a, b in zip(range(1, 21), cycle((2, 5, 9)), strict=False)]
    capitals = [f"What is the capital of {country}?" for country in _CAPITALS]
    return [*capitals, *(f"What is the opposite of {word}?" for word in _OPPOSITES), *sums]


@torch.inference_mode()
def compare_language(before, after, processor) -> dict:
    """
    Both models on text alone, in the chat format of the language model: their answers, the perplexity of what the
    untrained one wrote, and whether their logits of the tokens that it knew are equal to the bit.
    """
    tokenizer, models = processor.tokenizer, {"before": before.eval(), "after": after}
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # a new token whose row is that of a known one would be as likely: these are not to be chosen
    new = [after.config.image_token_id, after.config.end_of_chunk_token_id, after.config.answer_token_id]
    known = min(new)
    replies, losses, count, same = defaultdict(list), Counter(), 0, True
    questions = text_questions()
    for first in tqdm(range(0, len(questions), 25), desc="language"):
        prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions[first : first + 25]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        start = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop}
        written = {
            name: model.generate(**inputs, **options, suppress_tokens=new)[:, start:] for name, model in models.items()
        }
        targets = written["before"]
        # what follows the end of a reply is padding
        is_reply = (targets == stop).cumsum(1) - (targets == stop).long() == 0
        ids = torch.cat([inputs["input_ids"], targets], dim=1)
        mask = torch.cat([inputs["attention_mask"], is_reply.long()], dim=1)
        logits = {}
        for name, model in models.items():
            replies[name] += tokenizer.batch_decode(written[name], skip_special_tokens=True)
            # from the state in front of the first token of the reply
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=targets.shape[1] + 1)
            logits[name] = output.logits[:, :-1, :known][is_reply]
            loss = torch.nn.functional.cross_entropy(logits[name].float(), targets[is_reply], reduction="sum")
            losses[name] += loss.item()
        same &= torch.equal(logits["before"], logits["after"])
        count += int(is_reply.sum())
    figures = {f"perplexity_{name}": round(math.exp(loss / count), 6) for name, loss in losses.items()}
    return {
        "questions": len(replies["after"]),
        "equal_answers": sum(map(str.__eq__, replies["before"], replies["after"])),
        "logits_equal_to_the_bit": same,
        **figures,
        "examples": dict(list(zip(questions, replies["after"], strict=True))[::10]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo-real/model"))
    parser.add_argument("--untrained", type=Path, help="the model before its training, to compare the language")
    parser.add_argument("--data", type=Path, default=Path("out/demo-real/data"))
    parser.add_argument("--output", type=Path, default=Path("out/demo-real"))
    parser.add_argument("--limit", type=int, help="questions of each task")
    arguments = parser.parse_args()
    main(arguments.model, arguments.untrained, arguments.data, arguments.output, arguments.limit)
