"""What the processors of all families do alike: they take a message as it is meant, or say what they do not know."""

import difflib
from collections.abc import Mapping, Sequence

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


# where a part of a message may hold its picture or film
MEDIA_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
# of the tokenizer's options those that make no sense for a prompt with pictures
UNSUPPORTED_TEXT_OPTIONS = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "stride",
    "is_split_into_words",
    "return_overflowing_tokens",
)


class ChatProcessorMixin(ProcessorMixin):
    """A processor that refuses what it would otherwise drop: unknown options, parts of messages, and cut prompts."""

    # what its options are for
    modalities = ("text", "images", "videos")
    unsupported_text_options = UNSUPPORTED_TEXT_OPTIONS

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        tokenize: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        As in the parent class. The parts of a message are texts, `{"type": "text", "text": ...}`, and pictures and
        films, `{"type": "image", "image": ...}` and `{"type": "video", "video": ...}` (or `url`, `path`, `base64`;
        also OpenAI's `image_url` and vLLM's `video_url`), which the template puts where they stand.

        Raises:
            ValueError: naming the message and part, for parts of other types or with keys that are not theirs and, if
                `tokenize` is True, for pictures and films that are not there; for what the template has no place for:
                tools, documents and other keys of messages.
        """
        template = self._resolve_chat_template(chat_template)
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in template:
                raise ValueError(f"{name} were given, but the chat template has no place for them; leave them out.")
        with_media = tokenize and not (processor_kwargs or {}).get("images")
        conversation = read_conversations(conversation, template, with_media)
        if with_media:
            batched = isinstance(conversation[0], list)
            conversation = [self._fit_media(c) for c in conversation] if batched else self._fit_media(conversation)
        return super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            tools=tools,
            documents=documents,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _fit_media(self, messages: list[dict]) -> list[dict]:
        """The messages of a conversation with pictures and films as the processor can tell their order."""
        return messages

    def _merge_kwargs(
        self, ModelProcessorKwargs: type[ProcessingKwargs] | None = None, tokenizer_init_kwargs=None, **kwargs
    ) -> dict[str, dict]:
        options = ModelProcessorKwargs or self.valid_processor_kwargs
        known = {f"{modality}_kwargs": self._option_names(options, modality) for modality in self.modalities}
        flat = {name for name in options.__annotations__ if not name.endswith("_kwargs")}
        flat |= {"common_kwargs", *known, *set().union(*known.values())}
        for group, names, given in (
            ("", flat, kwargs),
            *((group, names, kwargs[group]) for group, names in known.items() if group in kwargs),
        ):
            for name, value in given.items():
                if name not in names:
                    near = difflib.get_close_matches(name, sorted(names), n=1)
                    raise ValueError(
                        f"{type(self).__name__} has no option {f'{group}.' if group else ''}{name} (given as "
                        f"{value!r:.80}); " + (f"did you mean {near[0]}?" if near else "leave it out.")
                    )
        merged = super()._merge_kwargs(ModelProcessorKwargs, tokenizer_init_kwargs=tokenizer_init_kwargs, **kwargs)
        for name in self.unsupported_text_options:
            if merged["text_kwargs"].get(name):
                raise ValueError(f"{type(self).__name__} does not support {name}; leave it out.")
        return merged

    def _option_names(self, options: type[ProcessingKwargs], modality: str) -> set[str]:
        part = {"text": "tokenizer", "images": "image_processor", "videos": "video_processor"}[modality]
        names = set(options.__annotations__[f"{modality}_kwargs"].__annotations__)
        valid = getattr(getattr(self, part, None), "valid_kwargs", None)
        return names | set(getattr(valid, "__annotations__", {}))


def read_conversations(conversation, template: str, with_media: bool) -> list:
    """
    A conversation, or a list of them, with the parts of all messages as transformers takes them.

    Args:
        conversation: see [`ChatProcessorMixin.apply_chat_template`].
        template: the Jinja template that will write it.
        with_media: whether pictures and films must be there.

    Raises:
        ValueError: naming the message and part, see [`ChatProcessorMixin.apply_chat_template`].
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ValueError("The conversation must be a list of messages {'role', 'content'}, or a list of such lists.")
    if isinstance(conversation[0], (list, tuple)):
        return [
            [_read_message(m, f"conversation[{row}][{i}]", template, with_media) for i, m in enumerate(messages)]
            for row, messages in enumerate(conversation)
        ]
    return [_read_message(message, f"messages[{i}]", template, with_media) for i, message in enumerate(conversation)]


def _read_message(message, name: str, template: str, with_media: bool):
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a message {{'role', 'content'}}, got {message!r:.80}.")
    for key, value in message.items():
        # clients send the empty fields of an answer back
        if key not in ("role", "content") and value and f"'{key}'" not in template:
            raise ValueError(f"{name} has {key!r}, which the chat template has no place for; leave it out.")
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return message
    parts = [_read_part(part, f"{name}.content[{i}]", with_media) for i, part in enumerate(content)]
    return {**message, "content": parts}


def _read_part(part, name: str, with_media: bool) -> dict:
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} must be a part {{'type', ...}}, got {part!r:.80}.")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind in ("image_url", "video_url"):
        url = part.pop(kind, None)
        # what else OpenAI has in it, `detail`, is how it would resize the picture
        url = url.get("url") if isinstance(url, Mapping) else url
        kind = kind.removesuffix("_url")
        part |= {"type": kind} | ({} if url is None else {"url": url})
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name} is of the type text, but has no text.")
        own = ("text",)
    elif kind in MEDIA_SOURCES:
        own = MEDIA_SOURCES[kind]
        sources = sum(key in part for key in own)
        if sources > 1 or (with_media and not sources):
            raise ValueError(f"{name} is of the type {kind} and has {sources} of {', '.join(own)}; give it one.")
    else:
        raise ValueError(f"{name} is of the type {kind!r}; use text, image, video, image_url or video_url.")
    for key in part.keys() - {"type", *own}:
        raise ValueError(f"{name} is of the type {kind} and has {key!r}, which it may not; make it a part of its own.")
    return part
