"""
Three short talks with a saved model about pictures of the test split, streamed.

    python examples/easy_vqa/chat.py --model out/demo/model

Everything here is transformers; `import otter_hf` only makes the model known to it.
"""

import argparse

import easy_vqa
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import otter_hf  # noqa: F401  registers the models with the Auto classes


def main(model_folder: str) -> None:
    """One question; follow-up questions; a question after two worked examples."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    pictures = [Image.open(easy_vqa.get_test_image_paths()[image]) for image in (5, 11, 23)]

    def reply(messages: list[dict]) -> dict:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        print(f"  {messages[-1]['content'][-1]['text']} ", end="", flush=True)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
        return assistant(processor.post_process_image_text_to_text(output)[0])

    print("One question:")
    reply([user("what shape is in the image?", pictures[0])])

    print("A conversation about one picture:")
    messages = []
    for turn, question in enumerate(("what color is the shape?", "is there a circle?", "what shape is present?")):
        messages.append(user(question, pictures[1] if turn == 0 else None))
        messages.append(reply(messages))

    print("Two worked examples with pictures of their own, then the question:")
    train_pictures = easy_vqa.get_train_image_paths()
    questions = zip(*easy_vqa.get_train_questions(), strict=True)
    examples = [example for example in questions if example[0] == "what is the color of the shape?"][:2]
    messages = []
    for question, answer, image in examples:
        messages += [user(question, Image.open(train_pictures[image])), assistant(answer)]
        print(f"  (example) {question} {answer}")
    reply([*messages, user("what is the color of the shape?", pictures[2])])


def user(text: str, picture: Image.Image | None = None) -> dict:
    image = [] if picture is None else [{"type": "image", "image": picture}]
    return {"role": "user", "content": [*image, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/demo/model")
    main(parser.parse_args().model)
