"""
Talks with a trained model about pictures of the test split, streamed, and one about none.

    python examples/real_parts/chat.py --model out/demo-real/model --data out/demo-real/data
"""

import argparse
from pathlib import Path

from measure import read_tasks
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import otter_hf  # noqa: F401  registers the models with the Auto classes
from otter_hf.data import render


def main(model_folder: Path, data: Path) -> None:
    """A question of each task, and one without a picture in the language model's own format."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for name, samples in read_tasks(data / "test.yaml").items():
        sample = samples[len(samples) // 2]
        (*_, (question, truth)) = sample["turns"]
        print(f"{name}: {question} (truth: {truth}) ", end="", flush=True)
        places = sample.get("media_places")
        text = render([(question, None)], "simple", sample["media_per_turn"], media_places=places)
        inputs = processor(text=[text], videos=[sample["media"]], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=streamer)
    question = "What is the capital of France?"
    print(f"without a picture: {question} ", end="", flush=True)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    model.generate(**inputs, max_new_tokens=24, do_sample=False, streamer=streamer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo-real/model"))
    parser.add_argument("--data", type=Path, default=Path("out/demo-real/data"))
    arguments = parser.parse_args()
    main(arguments.model, arguments.data)
