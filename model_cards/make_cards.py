"""
Writes the model cards of this folder from `facts.yaml`.

    python model_cards/make_cards.py
"""

from pathlib import Path

import yaml
from transformers import CONFIG_MAPPING

import otter_hf  # noqa: F401  registers the families
from otter_hf.conversion.memory import memory_table
from otter_hf.conversion.model_card import (
    OLD_CODE_DEFECTS,
    completion_usage,
    note_on_prompt,
    prompt_of,
    render_card,
    usage,
)


FOLDER = Path(__file__).parent
UNTESTED = (
    "Written from the code and the documents of 2023. The published weights themselves were not run for this card."
)


def commands(name: str, facts: dict) -> str:
    """How to get the model in today's format, and how to use it."""
    repository, model_type = facts["repository"], facts["config"]["model_type"]
    if model_type == "fuyu":
        return usage(repository)
    if "language_model" in facts:
        convert = (
            f"otter-hf convert openflamingo --checkpoint {repository} \\\n"
            f"    --language-model {facts['language_model']} \\\n"
            f"    --vision-tower openai/clip-vit-large-patch14 --dtype bfloat16 --output {name}"
        )
        return f"```shell\n{convert}\n```\n\n{completion_usage(name)}"
    convert = f"otter-hf convert dtype --source {repository} --dtype bfloat16 --output {name}"
    use = completion_usage(repository) if facts["summary"].endswith("No assistant.") else usage(repository)
    return (
        f"The repository of 2023 loads as it is:\n\n{use}\n\nSmaller and faster to load:\n\n```shell\n{convert}\n```"
    )


def make_card(name: str, facts: dict, defects: dict[str, str]) -> str:
    """The card of one model."""
    config = dict(facts["config"])
    config = CONFIG_MAPPING[config.pop("model_type")](**config)
    # of Otters that are no assistants yet, the text that Flamingo was trained on
    family = "flamingo" if facts["summary"].endswith("No assistant.") else config.model_type
    explained = {**OLD_CODE_DEFECTS, **defects}
    return render_card(
        name=name,
        summary=f"{facts['summary']} Published as `{facts['repository']}`.",
        metadata={"library_name": "otter-hf", "pipeline_tag": "image-text-to-text", "tags": [config.model_type]},
        lineage=facts["lineage"],
        prompt=prompt_of(family),
        tokens=facts.get("tokens"),
        licences=facts["licences"],
        defects=[explained[defect] for defect in facts["defects"]],
        memory=memory_table(config),
        commands=commands(name, facts),
        notes=[UNTESTED, *note_on_prompt(family), *facts.get("notes", [])],
    )


def all_cards() -> dict[str, str]:
    """File name -> card."""
    content = yaml.safe_load((FOLDER / "facts.yaml").read_text(encoding="utf-8"))
    models = content["models"].items()
    return {f"{name}.md": make_card(name, facts, content["defects"]) for name, facts in models}


if __name__ == "__main__":
    for filename, card in all_cards().items():
        (FOLDER / filename).write_text(card, encoding="utf-8")
