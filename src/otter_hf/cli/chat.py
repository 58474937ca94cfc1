"""`otter-hf chat`: ask a model about pictures in the terminal."""

import argparse
import sys
from pathlib import Path


HELP = "commands: /image PATH [PATH ...] adds pictures to your next message, /clear starts afresh, /quit ends"


def add_parser(subparsers):
    """Add the `chat` subcommand."""
    parser = subparsers.add_parser(
        "chat",
        help="ask a model about pictures",
        description=f"Chat with an image-text-to-text model, streaming its answers. Without --prompt it asks; {HELP}",
    )
    parser.add_argument("model", help="folder or Hub id, e.g. out/demo/model")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="picture for the first message")
    parser.add_argument("--prompt", action="append", default=[], help="ask this and end; repeat it for several turns")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) decodes greedily")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default=None, help="e.g. cuda, cpu, or auto to spread over devices")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> None:
    """Load the model and talk until the prompts, or the user's patience, end."""
    # heavy imports wait until someone chats
    from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

    import otter_hf  # noqa: F401  registers the families

    name = arguments.model
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model {name!r} is neither a folder on this machine nor a Hub id (owner/name).")
    # opened before the model loads: a mistyped path should not cost a minute
    pictures = [open_image(path) for path in arguments.image]
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype=arguments.dtype, device_map=arguments.device
    )
    model.eval()
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": arguments.temperature > 0}
    if sampling["do_sample"]:
        sampling["temperature"] = arguments.temperature

    messages = []
    interactive = not arguments.prompt
    prompts = iter(arguments.prompt)
    if interactive:
        print(HELP)
    while True:
        text = read_line() if interactive else next(prompts, None)
        if text is None or text == "/quit":
            break
        if text == "/clear":
            messages, pictures = [], []
            continue
        if text.startswith("/image"):
            try:
                pictures += [open_image(path) for path in text.split()[1:]]
            except ValueError as error:
                print(error, file=sys.stderr)
            continue
        content = [{"type": "image", "image": picture} for picture in pictures]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        pictures = []
        if not interactive:
            print(f"> {text}")
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, streamer=streamer, **sampling)
        answer = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def open_image(path: str):
    """The picture at `path` in RGB; ValueError naming it if it cannot be read."""
    from ..models.flamingo.processing_flamingo import read_image

    return read_image(path, path)


def read_line() -> str | None:
    """One line from the terminal; None at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return None
