"""Model cards, of converted folders and of published models, from one template and facts."""

import json

from ..prompts import FORMATS, render
from .memory import memory_table
from .report import ConversionReport


# what everyone meets who compares with the code of 2023
OLD_CODE_DEFECTS = {
    "cached decoding": (
        "with a key-value cache the 2023 Otter code lost the image after the first new token (Llama models by "
        "default, MPT models with `use_cache=True`); answers differ from its, and are those of its uncached decoding"
    ),
    "open_clip": (
        "with open_clip 2.23 or newer the OpenFlamingo code feeds other image features than the model was trained on; "
        "these here are those of 2.22 and older"
    ),
}


def prompt_of(model_type: str) -> str:
    """The prompt that a family's chat template writes for a picture and a question, as the cards show it."""
    if model_type == "flamingo":  # was trained on plain text
        return f"<image>{{text}}{FORMATS['plain'].end}"
    format, media = ("spaced", "first") if model_type == "otter" else ("fuyu", "none")
    # the processors of OtterHD put the picture in front by themselves
    return _visible(render([("{question}", None)], format, media))


def note_on_prompt(model_type: str) -> list[str]:
    """What else was asked in 2023, and which form is right."""
    if model_type == "flamingo":
        return []
    trained = _visible(render([("{question}", "{answer}")], "simple" if model_type == "otter" else "fuyu", "none"))
    if model_type == "otter":
        return [
            f"Trained on `{trained}`. The demos, the benchmarks and the README of 2023 asked with the blanks of the "
            "prompt above, and so does the chat template; a model fine-tuned here is asked as it was trained."
        ]
    return [
        f"The prompt is the one it was trained on, `{trained}`, and the chat template writes it. The benchmarks of "
        "2023 put a blank behind `User:`, which training never showed it; `otter-hf eval` does so only for "
        "`name: otterhd` in a YAML of 2023."
    ]


def _visible(text: str) -> str:
    return text.replace("\x04", "<0x04>")


def render_card(
    *,
    name: str,
    summary: str,
    metadata: dict,
    lineage: list[str],
    prompt: str | None = None,
    tokens: dict[str, int] | None = None,
    licences: dict[str, str] | None = None,
    defects: list[str] | None = None,
    memory: str | None = None,
    commands: str | None = None,
    notes: list[str] | None = None,
) -> str:
    """
    A model card in Markdown. Sections without facts are left out.

    Args:
        name, summary: title and first paragraph.
        metadata: the YAML block the Hub reads.
        lineage: what the model was made from, in order.
        prompt: the text that asks it, see `prompt_of`.
        tokens: special tokens and their ids.
        licences: part -> licence.
        defects: known faults of the published weights and of code for them.
        memory: a Markdown table.
        commands: Markdown with code blocks.
        notes: further remarks.
    """
    # JSON is YAML: lists and strings need no other quoting
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items())
    sections = [f"---\n{front}\n---", f"# {name}", summary]
    if lineage:
        sections.append(_bullets("Made from", lineage))
    if prompt:
        sections.append(f"## Prompt\n\n```\n{prompt}\n```")
    if tokens:
        # a bar ends a cell of a table, even in code
        escaped = {token.replace("|", "\\|"): token_id for token, token_id in tokens.items()}
        rows = "\n".join(f"| `{token}` | {token_id} |" for token, token_id in escaped.items())
        sections.append(f"## Special tokens\n\n| token | id |\n|---|---:|\n{rows}")
    if licences:
        sections.append(_bullets("Licences of the parts", [f"{part}: {text}" for part, text in licences.items()]))
    for title, items in (("Known defects", defects), ("Notes", notes)):
        if items:
            sections.append(_bullets(title, items))
    if memory:
        sections.append(
            "## Memory\n\nComputed from the configuration (`otter-hf memory`); activations come on top. int8 and "
            f"4-bit store linear layers so, except the output layer, and the rest in bfloat16.\n\n{memory}"
        )
    if commands:
        sections.append(f"## Use\n\n{commands}")
    return "\n\n".join(sections) + "\n"


def _bullets(title: str, items: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {item}" for item in items)


_LOADING = """```python
import otter_hf  # registers the model with the Auto classes
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{}"
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")"""


def usage(repository: str, question: str = "What is in the image?") -> str:
    """How to load a model and ask it something."""
    return f"""{_LOADING.format(repository)}
content = [{{"type": "image", "url": "image.jpg"}}, {{"type": "text", "text": "{question}"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.post_process_image_text_to_text(output)[0])
```"""


def trainable_usage(repository: str, base: str) -> str:
    """How to put trained weights and those of their base together."""
    return f"""```python
import otter_hf  # registers the model with the Auto classes
from huggingface_hub import snapshot_download
from otter_hf.training import load_trainable

folder = snapshot_download("{repository}")
model = load_trainable(folder, base="{base}", dtype="auto")
model.save_pretrained("whole")  # a folder like any other
```"""


def completion_usage(repository: str, prompt: str = "<image>An image of") -> str:
    """How to load a model without chat template and let it go on with a text."""
    return f"""{_LOADING.format(repository)}
inputs = processor(images="image.jpg", text="{prompt}", return_tensors="pt")
output = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=32)
print(processor.post_process_image_text_to_text(output)[0])
```"""


def conversion_card(config, report: ConversionReport, lineage: list[str]) -> str:
    """The card of a folder that a conversion wrote."""
    family, name, licence = config.model_type, config.model_type.capitalize(), "those of the sources above"
    if family == "fuyu":
        family, name, licence = "otterhd", "OtterHD", f"{licence}; the weights of Fuyu-8B are CC-BY-NC-4.0"
    notes = [*note_on_prompt(family), *report.notes]
    notes += [f"{name}: {how}" for name, how in list(report.initialised.items())[:8]]
    if len(report.initialised) > 8:
        notes.append(f"{len(report.initialised) - 8} more weights were initialised; see `conversion_report.json`")
    return render_card(
        name=f"{name}, converted with otter-hf",
        summary=f"Written by `otter-hf convert {report.conversion}`. What became of every source tensor is in "
        "`conversion_report.json`.",
        metadata={
            "library_name": "otter-hf",
            "pipeline_tag": "image-text-to-text",
            "tags": list(dict.fromkeys((family, config.model_type))),
        },
        lineage=[f"`{path}`" for path in lineage],
        prompt=prompt_of(family),
        tokens=report.token_table,
        licences={"all": f"{licence}; a conversion changes none of them"},
        defects=[] if family == "otterhd" else list(OLD_CODE_DEFECTS.values()),
        memory=memory_table(config),
        commands=completion_usage("PATH") if family == "flamingo" else usage("PATH"),
        notes=notes,
    )
