"""The page: a chat with pictures and videos, two worked examples, and the settings of an answer (Gradio 6)."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr
import openai

from .history import to_messages


EXAMPLES = Path(__file__).parent / "examples"
NUM_WORKED_EXAMPLES = 2
# fonts of the visitor's own machine: the page loads nothing from elsewhere
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build_page(client: openai.OpenAI, flag_folder: str | Path) -> gr.Blocks:
    """
    Args:
        client: of the server that answers. Its models are the choices of the page.
        flag_folder: where `log.csv` collects the conversations that visitors rate; no others are kept.

    Returns:
        the page; `launch(theme=THEME)` shows it.

    Raises:
        openai.APIConnectionError: if the server does not answer.
    """
    models = [model.id for model in client.models.list()]
    with gr.Blocks(title="Otter", fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(
            "# Otter\nAsk about pictures and videos. Add them with the clip, and ask on about them without adding "
            "them again. Only conversations you rate are kept."
        )
        worked_examples = []
        with gr.Accordion("Worked examples: show the model how to answer", open=False), gr.Row():
            for number in range(1, NUM_WORKED_EXAMPLES + 1):
                with gr.Column(min_width=260):
                    worked_examples += [
                        gr.Image(label=f"Picture {number}", type="filepath", height=180, sources=["upload"]),
                        gr.Textbox(label=f"Question {number}", lines=1),
                        gr.Textbox(label=f"Answer {number}", lines=1),
                    ]
        # shown below the chat, by it
        settings = [
            gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1, render=False),
            gr.Slider(16, 512, 512, step=1, label="Longest answer in tokens", render=False),
            gr.Slider(0, 1, 0, step=0.05, label="Temperature (0: always the likeliest word)", render=False),
            gr.Slider(0, 1, 1, step=0.05, label="Top p", render=False),
            gr.Slider(0, 100, 0, step=1, label="Top k (0: all)", render=False),
            gr.Slider(1, 4, 1, step=1, label="Beams (more than 1: the answer comes at once)", render=False),
            gr.Slider(0, 10, 3, step=1, label="Words in a row that may not repeat (0: any)", render=False),
            gr.Slider(-5, 5, 1, step=0.5, label="Length penalty of beams", render=False),
        ]
        textbox = gr.MultimodalTextbox(
            file_types=["image", "video"],
            file_count="multiple",
            placeholder="What is in the picture?",
            show_label=False,
            stop_btn=True,
            render=False,
        )
        gr.ChatInterface(
            partial(answer, client),
            multimodal=True,
            chatbot=gr.Chatbot(
                height="55vh",
                min_height=260,
                label="Conversation",
                buttons=["copy"],
                placeholder="Add a picture and ask.",
            ),
            textbox=textbox,
            additional_inputs=[*worked_examples, *settings],
            additional_inputs_accordion=gr.Accordion("Parameters", open=False, render=False),
            editable=True,
            flagging_mode="manual",
            flagging_options=("Like", "Dislike", "Flag"),
            flagging_dir=str(flag_folder),
            concurrency_limit=None,  # the server has a queue
            api_name="chat",
        )
        labels, values = zip(*page_examples().items(), strict=True)
        gr.Examples(list(values), [textbox, *worked_examples], example_labels=list(labels), api_visibility="private")
    return page


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


def answer(client: openai.OpenAI, message: dict, history: list[dict], *inputs) -> Iterator[str]:
    """
    The answer so far, as it grows. When the visitor stops it, the server is told.

    Args:
        client: of the server.
        message: `{"text", "files"}` just sent.
        history: of the chat before it.
        inputs: the worked examples, then the settings, in the order of the page.

    Raises:
        gr.Error: with the sentence of the server that refused.
    """
    boxes, settings = inputs[: 3 * NUM_WORKED_EXAMPLES], inputs[3 * NUM_WORKED_EXAMPLES :]
    model, max_tokens, temperature, top_p, top_k, num_beams, no_repeat, length_penalty = settings
    asked = {"role": "user", "content": [*({"path": path} for path in message["files"]), message["text"]]}
    generation = {
        "top_k": int(top_k),
        "num_beams": int(num_beams),
        "no_repeat_ngram_size": int(no_repeat),
        "length_penalty": length_penalty,
    }
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=to_messages([*history, asked], list(zip(boxes[::3], boxes[1::3], boxes[2::3], strict=True))),
            max_tokens=int(max_tokens),
            temperature=temperature,
            top_p=top_p,
            stream=True,
            extra_body={"generation_config": json.dumps(generation)},
        )
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
        raise gr.Error(body.get("message") or str(error), title="The server refused") from error
    except (openai.APIError, ValueError) as error:
        raise gr.Error(str(error), title="No answer") from error
