"""Our models and processors on what write_2023.py left: the same prompts and pictures, end to end.

Usage: compare.py FOLDER [CASE ...]. Prints the table of docs/fidelity.md, and writes it there when every case was run;
exits with 1 where the two differ by more than the bounds below.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.conversion import finish, plan_openflamingo


DOCS = Path(__file__).resolve().parents[2] / "docs" / "fidelity.md"
MARKS = ("<!-- written by make parity-2023 -->", "<!-- end -->")
HEADER = "| case | 2023 | ids | pixels | logits | greedy text | beam text | 2023 with its cache |"
LOGITS, PIXELS = 1e-4, 1 / 255 / 0.26  # the second: one step of 8 bits, divided by CLIP's smallest deviation


def load(folder: Path, facts: dict):
    """Processor and model from the folder the old code wrote, or from the checkpoint it would have written."""
    tokenizer = folder.parent / facts["base"]
    reference = {"tokenizer_reference": "4.35"} if "llama" in facts["base"] else {}
    source = folder / "model"
    if facts["kind"] == "checkpoint":
        job = plan_openflamingo(folder / "checkpoint.pt", folder / "llm", folder / "clip.pt", tokenizer, **reference)
        finish(job, source)
        tokenizer, reference = None, {}
    own = {} if tokenizer is None else {"tokenizer": tokenizer}
    processor = AutoProcessor.from_pretrained(source, **own, **reference)
    # the old code knew no other attention
    model = AutoModelForImageTextToText.from_pretrained(source, **own, attn_implementation="eager")
    # and chose from the untrained rows of a padded vocabulary, too
    model.config.tokenizer_vocab_size = None
    return processor, model.eval()


def media_of(row: dict, num_frames: int, pictures: list) -> dict:
    if num_frames == 1:
        return {"images": [[pictures[i] for i in indices] for indices in row["pictures"]]}
    film = [[np.roll(np.asarray(picture), 8 * frame, 1) for frame in range(num_frames)] for picture in pictures]
    return {"videos": [[[Image.fromarray(f) for f in film[i]] for i in indices] for indices in row["pictures"]]}


def pixel_difference(ours: torch.Tensor, old: torch.Tensor) -> float:
    """
    The largest difference, picture by picture. Where half a pixel is left over, torchvision, and so open_clip, rounds
    the corner of its crop and transformers cuts: a crop may begin one pixel earlier.
    """
    pairs = ((ours, old), (ours[..., 1:], old[..., :-1]), (ours[..., 1:, :], old[..., :-1, :]))
    differences = [(a - b).abs().amax((-3, -2, -1)) for a, b in pairs]
    return torch.stack(differences).amin(0).max().item()


def compare(folder: Path, pictures: list) -> tuple[str, bool]:
    """One line of the table, and whether all of it is within bounds."""
    facts = json.loads((folder / "case.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    processor, model = load(folder, facts)
    equal_ids, equal_texts, pixel_error, logit_error = 0, {"greedy": 0, "beam": 0}, 0.0, 0.0
    lost, total = 0, 0
    for i, row in enumerate(facts["rows"]):
        inputs = processor(text=row["prompts"], **media_of(row, facts["num_frames"], pictures), return_tensors="pt")
        ids, mask = expected[f"{i}.ids"], expected[f"{i}.mask"]
        same = torch.equal(inputs["input_ids"], ids) and torch.equal(inputs["attention_mask"], mask)
        equal_ids += same
        if not same:
            print(f"{facts['name']}: {row['prompts']}\n  2023 {ids.tolist()}\n  ours {inputs['input_ids'].tolist()}")
            continue
        pixel_error = max(pixel_error, pixel_difference(inputs["pixel_values"], expected[f"{i}.pixels"]))
        old_pixels = {**inputs, "pixel_values": expected[f"{i}.pixels"]}
        with torch.no_grad():
            logits = model(**old_pixels).logits
        stored = slice(facts.get("base_rows"))
        difference = (logits - expected[f"{i}.logits"])[mask == 1][:, stored]
        logit_error = max(logit_error, difference.abs().max().item())
        for mode, options in {"greedy": {}, "beam": {"num_beams": 3, "no_repeat_ngram_size": 3}}.items():
            # end to end: our pixels, our ids, our cache
            output = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=facts["suppress"], **options
            )
            texts = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=False)
            equal_texts[mode] += texts == row[mode]
            if texts != row[mode]:
                print(f"{facts['name']}, {mode}: {row['prompts']}\n  2023 {row[mode]}\n  ours {texts}")
            lost += row[f"{mode}_cached"] != row[mode]
            total += 1
    count = len(facts["rows"])
    versions, package = facts["versions"], "open-flamingo" if facts["kind"] == "checkpoint" else "otter-ai"
    line = (
        f"| {facts['name']} | {package} {versions[package]} | {equal_ids} of {count} equal | {pixel_error:.1e} | "
        f"{logit_error:.1e} | {equal_texts['greedy']} of {count} equal | {equal_texts['beam']} of {count} equal | "
        f"{f'other text in {lost} of {total}' if lost else 'same text'} |"
    )
    right = equal_ids == count and set(equal_texts.values()) == {count}
    return line, right and pixel_error <= PIXELS and logit_error <= LOGITS


def main() -> int:
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    pictures = [Image.open(path).convert("RGB") for path in sorted(work.glob("picture*"))]
    results = []
    for path in sorted(work.glob("*/case.json")):
        if len(sys.argv) > 2 and path.parent.name not in sys.argv[2:]:
            continue
        results.append(compare(path.parent, pictures))
        print(results[-1][0], flush=True)
    versions = json.loads(path.read_text())["versions"]
    table = "\n".join([HEADER, "|---" * (HEADER.count("|") - 1) + "|", *(line for line, _ in results)])
    old = ", ".join(f"{name} {versions[name]}" for name in ("transformers", "open_clip_torch", "pillow", "torch"))
    table = f"The old code ran with {old}.\n\n{table}"
    right = all(right for _, right in results)
    if right and len(results) == 8:
        before, rest = DOCS.read_text().split(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    print("equal within the bounds" if right else "DIFFERENT")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
