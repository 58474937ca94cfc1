"""What a few-shot question looks like: in a chat, or in the raw form Flamingo was trained on."""

from dataclasses import dataclass


# image tokens and texts as they come; an answer ends with `<|endofchunk|>`
FLAMINGO_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<|endofchunk|>{% endif %}{% endfor %}"
)

_CHAT = {
    "caption": "What does the image describe?",
    "vqa": "{question} Please answer in short words.",
    "imagenet": "What is the main object in the image?",
    "hateful_memes": "This is an image with: '{text}' written on it. Is it hateful? Please answer yes or no.",
}
_FLAMINGO = {
    "caption": "Output:",
    "vqa": "Question:{question} Short answer:",
    "imagenet": "Output:",
    "hateful_memes": "is an image with: '{text}' written on it. Is it hateful? Answer:",
}


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        text: of a question, with the row's columns in braces.
        text_only_zero_shot: whether "0 shots" means two demonstrations without their pictures.
    """

    text: str
    text_only_zero_shot: bool = False

    def ask(self, row: dict) -> str:
        """The question of a row."""
        return self.text.format(**{name: row[name] for name in ("question", "text") if name in row})


def prompts_for(lm, kind: str) -> tuple[Prompts, str | None]:
    """
    How a model is asked, and the chat template for it where it is not the model's own.

    As in 2023: Flamingo in its raw form with text-only demonstrations at 0 shots; Otter in its chat form for captions
    and answers, raw for the rankings. All other models are asked in their own chat form.
    """
    from ...models.flamingo.processing_flamingo import FlamingoProcessor

    processor = getattr(lm, "processor", None)  # an endpoint has none
    if not isinstance(processor, FlamingoProcessor):
        return Prompts(_CHAT[kind]), None
    if processor.chat_template is None:
        return Prompts(_FLAMINGO[kind], text_only_zero_shot=True), FLAMINGO_TEMPLATE
    if kind in ("imagenet", "hateful_memes"):
        return Prompts(_FLAMINGO[kind]), FLAMINGO_TEMPLATE
    return Prompts(_CHAT[kind]), None
