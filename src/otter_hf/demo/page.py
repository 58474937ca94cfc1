"""The page: a chat with pictures and videos, two worked examples, and the settings of an answer (Gradio 6)."""

import re
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import openai
from gradio.flagging import ChatCSVLogger
from transformers.utils import logging

from .history import FAILED, edited, last_question, path_of, to_messages


logger = logging.get_logger(__name__)

EXAMPLES = Path(__file__).parent / "examples"
NUM_WORKED_EXAMPLES = 2
# fonts of the visitor's own machine: the page loads nothing from elsewhere
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Gradio's button for sharing a picture needs a server elsewhere
CSS = "button[aria-label=Share] { display: none }"
# of settings that OpenAI's API has not, the values that ask for nothing
_NOTHING = {"top_k": 0, "num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1}
_PART = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]\.\w+_url")


class Failure(str):
    """In place of an answer: the sentence that says why there is none."""


def build_page(client: openai.OpenAI, flag_folder: str | Path) -> gr.Blocks:
    """
    Args:
        client: of the server that answers. Its models are the choices of the page.
        flag_folder: where `log.csv` collects the conversations that visitors rate; no others are kept.

    Returns:
        the page; `launch(theme=THEME, css=CSS)` shows it.

    Raises:
        openai.APIConnectionError: if the server does not answer.
    """
    models = [model.id for model in client.models.list()]
    examples = page_examples()
    with gr.Blocks(title="Otter", fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(
            "# Otter\nAsk about pictures and videos. Add them with the clip, and ask on about them without adding "
            "them again. Only conversations you rate are kept."
        )
        model = gr.Dropdown(models, value=models[0], label="Model", interactive=len(models) > 1)
        worked_examples = []
        with gr.Accordion("Worked examples", open=False), gr.Row():
            for number in range(1, NUM_WORKED_EXAMPLES + 1):
                with gr.Column(min_width=260):
                    picture = gr.Image(
                        label=f"Picture {number}",
                        type="filepath",
                        image_mode=None,  # the file as it is
                        height=180,
                        sources=["upload"],
                        buttons=["fullscreen"],
                    )
                    picture.upload(_ignore, picture, None, api_visibility="private").failure(
                        _refuse_picture, None, picture, api_visibility="private"
                    )
                    worked_examples += [
                        picture,
                        gr.Textbox(label=f"Question {number}", lines=1),
                        gr.Textbox(label=f"Answer {number}", lines=1),
                    ]
        chatbot = gr.Chatbot(
            height="55vh",
            min_height=260,
            label="Conversation",
            show_label=False,  # it would lie on the words
            buttons=["copy"],
            editable="user",
            group_consecutive_messages=False,  # what stands in a bubble with a picture cannot be edited
            feedback_options=("Like", "Dislike", "Flag"),
            placeholder="Add a picture and ask, or begin with one of these.",
            examples=[
                {"text": message["text"], "files": message["files"], "display_text": label}
                for label, (message, *_) in examples.items()
            ],
        )
        textbox = gr.MultimodalTextbox(
            file_types=["image", "video"],
            file_count="multiple",
            placeholder="What is in the picture?",
            show_label=False,
            autofocus=True,
        )
        with gr.Accordion("Parameters", open=False):
            settings = [
                gr.Slider(16, 512, 512, step=1, label="Longest answer in tokens"),
                gr.Slider(0, 1, 0, step=0.05, label="Temperature (0: always the likeliest word)"),
                gr.Slider(0, 1, 1, step=0.05, label="Top p"),
                gr.Slider(0, 100, 0, step=1, label="Top k (0: all)"),
                gr.Slider(1, 4, 1, step=1, label="Beams (more than 1: the answer comes at once)"),
                gr.Slider(0, 10, 0, step=1, label="Words in a row that may not repeat (0: any)"),
                gr.Slider(-5, 5, 1, step=0.5, label="Length penalty of beams"),
            ]
        inputs = [*worked_examples, model, *settings]
        _wire(client, chatbot, textbox, inputs)

        def fill(chosen: gr.SelectData) -> list:
            return list(examples.values())[chosen.index]

        chatbot.example_select(fill, None, [textbox, *worked_examples], api_visibility="private")
        flags = ChatCSVLogger()
        flags.setup(str(flag_folder))
        chatbot.like(flags.flag, chatbot, api_visibility="private")
    return page


def _ignore(picture: str) -> None:
    """Gradio has read the picture to get here."""


def _refuse_picture() -> None:
    gr.Warning("This file cannot be read as a picture.")


def _wire(client: openai.OpenAI, chatbot: gr.Chatbot, textbox: gr.MultimodalTextbox, inputs: list) -> None:
    """
    What happens when a visitor asks, asks again, edits, takes back and stops.

    Written out, as `gr.ChatInterface` closes its textbox while it answers, for good where anything fails, and loses
    the pictures of a question that is edited.
    """

    def respond(history: list[dict], message: dict, *values, **box) -> Iterator[tuple]:
        parts = [{"path": path_of(file)} for file in message["files"]] + [message["text"]] * bool(message["text"])
        # a message for each, as Gradio's browser side cannot edit the text of one that has files too
        asked = [*history, *({"role": "user", "content": part} for part in parts)]
        yield gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **box), asked
        for text in answer(client, message, history, *values):
            metadata = {"title": FAILED} if isinstance(text, Failure) else None
            shown = [*asked, {"role": "assistant", "content": str(text), "metadata": metadata}]
            yield gr.skip(), shown
        yield gr.MultimodalTextbox(submit_btn=True, stop_btn=False), shown

    def submit(message: dict, history: list[dict], *values) -> Iterator[tuple]:
        if message["text"] or message["files"]:
            yield from respond(history, message, *values, value=None)

    def retry(history: list[dict], *values) -> Iterator[tuple]:
        yield from respond(*last_question(history), *values)

    def edit(history: list[dict], edit: gr.EditData, *values) -> Iterator[tuple]:
        yield from respond(*last_question(edited(history, edit.index, edit.value)), *values)

    outputs = [textbox, chatbot]
    streamed = {"show_progress": "minimal", "concurrency_limit": None}  # the server has a queue
    events = [
        textbox.submit(submit, [textbox, chatbot, *inputs], outputs, api_name="chat", **streamed),
        chatbot.retry(retry, [chatbot, *inputs], outputs, api_visibility="private", **streamed),
        chatbot.edit(edit, [chatbot, *inputs], outputs, api_visibility="private", **streamed),
    ]
    rested = (lambda: gr.MultimodalTextbox(submit_btn=True, stop_btn=False), None, textbox)
    for event in events:
        event.failure(*rested, api_visibility="private", queue=False)
    textbox.stop(*rested, cancels=events, api_visibility="private", queue=False)
    chatbot.undo(last_question, chatbot, [chatbot, textbox], api_visibility="private", queue=False)


def page_examples() -> dict[str, list]:
    """What to try with the files of the package: label -> values of the message and of the worked examples."""
    pictures = {path.stem: str(path) for path in sorted(EXAMPLES.iterdir())}
    none = [None, "", ""] * NUM_WORKED_EXAMPLES
    worked = [pictures["square"], "What shape is it?", "A blue square."]
    worked += [pictures["triangle"], "What shape is it?", "A green triangle."]
    return {
        "A picture": [{"text": "What shape is in the image?", "files": [pictures["circle"]]}, *none],
        "A picture after two worked examples": [
            {"text": "What shape is it?", "files": [pictures["circle"]]},
            *worked,
        ],
        "Two pictures": [
            {"text": "What is different?", "files": [pictures["square"], pictures["triangle"]]},
            *none,
        ],
        "A video": [{"text": "Which way does the ball move?", "files": [pictures["ball"]]}, *none],
    }


def answer(client: openai.OpenAI, message: dict | str, history: list[dict], *inputs) -> Iterator[str]:
    """
    The answer so far, as it grows; where there is none, a [`Failure`]. When the visitor stops it, the server is told.

    Args:
        client: of the server.
        message: `{"text", "files"}` just sent, where a file is a path or has one; or a text alone.
        history: of the chat before it.
        inputs: the worked examples, then the settings, in the order of the page.
    """
    message = {"text": message, "files": []} if isinstance(message, str) else message
    boxes, settings = inputs[: 3 * NUM_WORKED_EXAMPLES], inputs[3 * NUM_WORKED_EXAMPLES :]
    model, max_tokens, temperature, top_p, top_k, num_beams, no_repeat, length_penalty = settings
    asked = {"role": "user", "content": [*({"path": path_of(file)} for file in message["files"]), message["text"]]}
    chosen = (int(top_k), int(num_beams), int(no_repeat), length_penalty)
    generation = dict(zip(_NOTHING, chosen, strict=True))
    messages = []
    try:
        messages = to_messages([*history, asked], list(zip(boxes[::3], boxes[1::3], boxes[2::3], strict=True)))
        request = {"model": model, "messages": messages, "max_tokens": int(max_tokens), "temperature": temperature}
        stream = _stream(client, generation, **request, top_p=top_p)
        text = ""
        with stream:
            for chunk in stream:
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    text += piece
                    yield text
        if not text:
            yield "(The model said nothing.)"
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        yield Failure(_name_files(body.get("message") or str(error), message["files"], len(messages) - 1))
    except (openai.APIError, ValueError, OSError) as error:
        yield Failure(error)
    except Exception as error:  # whatever went wrong, the page goes on
        logger.exception("There is no answer.")
        yield Failure(f"{type(error).__name__}: {error}")


def _stream(client: openai.OpenAI, generation: dict, **request) -> openai.Stream:
    """The answer as it comes. A server that refuses settings beside OpenAI's is told those alone that ask for more."""
    try:
        return client.chat.completions.create(**request, stream=True, extra_body=generation)
    except (openai.BadRequestError, openai.UnprocessableEntityError):
        asking = {name: value for name, value in generation.items() if value != _NOTHING[name]}
        if asking == generation:
            raise
        return client.chat.completions.create(**request, stream=True, extra_body=asking)


def _name_files(sentence: str, files: list, number: int) -> str:
    """A server's sentence with the names of the files of message `number`, which are the first parts of it."""

    def name(found: re.Match) -> str:
        message, part = map(int, found.groups())
        return Path(path_of(files[part])).name if message == number and part < len(files) else found[0]

    return _PART.sub(name, sentence)
