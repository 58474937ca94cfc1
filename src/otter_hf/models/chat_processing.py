"""What the processors of all families do alike: they take a message as it is meant, or say what they do not know."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from ..reading import whole_characters
from .prepared_media import PreparedMedium


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in the parent class; `padding_side` goes before the left, which generation needs."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("padding_side") is not None:
            processor.tokenizer.padding_side = kwargs["padding_side"]
        return processor

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
                tools, documents and other keys of messages; for pictures both in messages and in
                `processor_kwargs`; and with its own sentence for what the template refuses, such as roles that do not
                alternate.
        """
        template = self._resolve_chat_template(chat_template)
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in template:
                raise ValueError(f"{name} were given, but the chat template has no place for them; leave them out.")
        options = kwargs | (processor_kwargs or {})
        if options.get("videos") is not None:
            raise ValueError("videos were given beside the messages; put each where it stands, in a part.")
        elsewhere = ("image",) if tokenize and options.get("images") is not None else ()
        conversation = read_conversations(conversation, template, tokenize, elsewhere)
        if tokenize and not elsewhere:
            batched = isinstance(conversation[0], list)
            conversation = [self._fit_media(c) for c in conversation] if batched else self._fit_media(conversation)
        try:
            return super().apply_chat_template(
                conversation,
                chat_template=chat_template,
                tools=tools,
                documents=documents,
                tokenize=tokenize,
                processor_kwargs=processor_kwargs,
                **kwargs,
            )
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def prepare_media(self, messages: list[dict], **kwargs) -> list[dict]:
        """
        The messages of a conversation with every picture and film made ready as a [`PreparedMedium`], which stands in
        further messages without being read and resized again. What is ready stays as it is.

        Args:
            messages: see [`~ChatProcessorMixin.apply_chat_template`].
            kwargs: how to read them: options of the processor.

        Raises:
            ValueError: naming the message and part that cannot be read.
        """
        prepared = []
        for i, message in enumerate(read_conversations(messages, self._resolve_chat_template(None), True)):
            if isinstance(message["content"], list):
                content = []
                for j, part in enumerate(message["content"]):
                    if part["type"] != "text":
                        (medium,) = (value for key, value in part.items() if key != "type")
                        if not isinstance(medium, PreparedMedium):
                            try:
                                medium = self._prepare_medium(part["type"], medium, **kwargs)
                            except ValueError as error:
                                raise ValueError(f"messages[{i}].content[{j}]: {error}") from error
                        part = {"type": part["type"], part["type"]: medium}
                    content.append(part)
                message = {**message, "content": content}
            prepared.append(message)
        return prepared

    def _prepare_medium(self, kind: str, medium, **kwargs) -> PreparedMedium:
        """A picture (`kind` is `image`) or film (`video`) made ready."""
        raise NotImplementedError

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
        # as code for any model gives what it does not want
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name in flat}
        for group, names, given in (
            ("", flat, kwargs),
            *((group, names, kwargs[group]) for group, names in known.items() if group in kwargs),
        ):
            for name, value in given.items():
                if name not in names:
                    near = difflib.get_close_matches(name, sorted(names), n=1)
                    advice = f"did you mean {near[0]}?" if near else "leave it out."
                    if name in vars(GenerationConfig()):
                        advice = "give it to generate, or to a pipeline as generate_kwargs={...}."
                    raise ValueError(
                        f"{type(self).__name__} has no option {f'{group}.' if group else ''}{name} (given as "
                        f"{value!r:.80}); {advice}"
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


def map_parts(messages: Iterable[dict], function: Callable[[dict], Iterable[dict]]) -> list[dict]:
    """Messages with what the function gives in place of each part of a content; contents that are a text stay."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [new for part in message["content"] for new in function(part)]}
        for message in messages
    ]


def media_parts_of(messages: Iterable[dict]) -> list[dict]:
    """The pictures and films of messages, in their order."""
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return [part for content in contents for part in content if part["type"] != "text"]


def as_rows(ids) -> list[list[int]]:
    """Token ids, `(B, L)` or one sequence `(L,)`, of any kind as a list of lists."""
    ids = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
    return [list(row) for row in ids] if not ids or isinstance(ids[0], (list, tuple)) else [ids]


def read_texts(text) -> list[str]:
    """
    One text or any number of them as a list, see [`whole_characters`].

    Raises:
        ValueError: for anything else, and for none.
    """
    if isinstance(text, str):
        return [whole_characters(text)]
    if not isinstance(text, Iterable) or isinstance(text, (bytes, Mapping)):
        raise ValueError(f"text must be a text or a list of texts, got {text!r:.80}.")
    texts = list(text)
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise ValueError(f"text[{index}] must be a text, got {item!r:.80}.")
    if not texts:
        raise ValueError("text is an empty list; give at least one text.")
    return [whole_characters(item) for item in texts]


def read_conversations(conversation, template: str, with_media: bool, elsewhere: Collection[str] = ()) -> list:
    """
    A conversation, or a list of them, with the parts of all messages as transformers takes them.

    Args:
        conversation: see [`ChatProcessorMixin.apply_chat_template`].
        template: the Jinja template that will write it.
        with_media: whether pictures and films must be there.
        elsewhere: kinds of media that are given beside the messages, which then only place them.

    Raises:
        ValueError: naming the message and part, see [`ChatProcessorMixin.apply_chat_template`].
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        raise ValueError("The conversation must be a list of messages {'role', 'content'}, or a list of such lists.")
    batched = isinstance(conversation[0], (list, tuple))
    read = []
    for row, messages in enumerate(conversation if batched else [conversation]):
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"conversation[{row}] must be a list of messages {{'role', 'content'}}.")
        name = f"conversation[{row}]" if batched else "messages"
        read.append(
            [_read_message(m, f"{name}[{i}]", template, with_media, elsewhere) for i, m in enumerate(messages)]
        )
    return read if batched else read[0]


def _read_message(message, name: str, template: str, with_media: bool, elsewhere: Collection[str]):
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be a message {{'role', 'content'}}, got {message!r:.80}.")
    for key, value in message.items():
        # clients send the empty fields of an answer back
        if key not in ("role", "content") and value and f"'{key}'" not in template:
            raise ValueError(f"{name} has {key!r}, which the chat template has no place for; leave it out.")
    content = message.get("content")
    # an answer may be without words
    if isinstance(content, str) or (content is None and message.get("role") == "assistant"):
        return {**message, "content": content or ""}
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{name}.content must be a text or a list of parts, got {content!r:.80}.")
    parts = [_read_part(part, f"{name}.content[{i}]", with_media, elsewhere) for i, part in enumerate(content)]
    return {**message, "content": parts}


def _read_part(part, name: str, with_media: bool, elsewhere: Collection[str]) -> dict:
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
        if sources and kind in elsewhere:
            raise ValueError(f"{name} brings its {kind}, but {kind}s are given beside the messages too; choose one.")
        if sources > 1 or (with_media and not sources and kind not in elsewhere):
            raise ValueError(f"{name} is of the type {kind} and has {sources} of {', '.join(own)}; give it one.")
    else:
        raise ValueError(f"{name} is of the type {kind!r}; use text, image, video, image_url or video_url.")
    for key in part.keys() - {"type", *own}:
        raise ValueError(f"{name} is of the type {kind} and has {key!r}, which it may not; make it a part of its own.")
    return part
