"""lmms-eval's view of models: `--model otter --model_args path=FOLDER`, by the entry point `lmms_eval.models`."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.chat.openai import OpenAICompatible
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from transformers.utils import logging

from ..data.controls import control_media, control_messages
from ..loading import read_processor
from ..made_from import MadeFrom, keep, kept, state_of_model
from ..models.otterhd import OtterHDProcessor
from ..prompts import read_chat_template
from ..thinking import strip_thinking
from .benchmarks import BENCHMARKS
from .config import whole_number
from .model import ConversationModel
from .replies import ReplyLog, answer_all
from .scoring.replies import FAILED_REQUEST


logger = logging.get_logger(__name__)


class ResumableModel(lmms):
    """
    Answers requests in batches and keeps the replies of each batch on disk before it goes on.

    lmms-eval's own response cache keeps a task's replies when all are there; a kill loses them.

    Attributes:
        replies: a [`ReplyLog`], or None to keep nothing.
        batch_size: requests per batch.
        window: requests that are known at a time, from which batches are made.
        control: None, or one of [`~otter_hf.data.controls.CONTROLS`]: every question is asked with other pictures.
    """

    is_simple = False
    replies: ReplyLog | None = None
    control: str | None = None

    @property
    def window(self) -> int:
        return int(self.batch_size)

    def answer(self, items: Sequence, question: Callable, ask: Callable[[list, set[int]], Iterator[dict]]) -> list:
        """
        The replies to all items.

        Args:
            items: anything.
            question: what a reply depends on.
            ask: see `answer_all`.
        """
        return list(answer_all(items, question, ask, self.window, self.replies, disable=self.rank > 0))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request."""
        requests = [self._controlled(request) for request in requests]
        replies = self.answer(requests, lambda request: [self.messages(request), request.args[2]], self._ask)
        # our own scores leave thoughts out when they read, and their logs show them; other tasks know of none
        return [
            reply if request.args[4] in BENCHMARKS else strip_thinking(reply)
            for request, reply in zip(requests, replies, strict=True)
        ]

    def _controlled(self, request: Instance) -> Instance:
        """A request as the control has it: what makes the messages, or finds the pictures, of a row gives others."""
        if self.control is None:
            return request
        *arguments, number, task, split = request.args
        place = next(place for place, argument in enumerate(arguments) if callable(argument))
        of_doc, docs = arguments[place], self.task_dict[task][split]
        change = control_messages if request.request_type == "generate_until" else control_media
        arguments[place] = lambda doc: change(
            self.control, of_doc(doc), number, len(docs), lambda row: of_doc(docs[row])
        )
        request = copy.copy(request)
        request.arguments = (*arguments, number, task, split)
        return request

    def messages(self, request: Instance) -> list[dict]:
        """The conversation of a request, as transformers writes it."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()


class TransformersModel(ResumableModel):
    """
    Any image-text-to-text model of transformers for lmms-eval. It is loaded when the first reply is missing.

    Args:
        path: see [`ConversationModel`], which all other keywords go to.
        batch_size: conversations per forward pass.
        replies: folder in which replies are kept, so that an interrupted run goes on where it ended.
        pretrained: what lmms-eval's own models call the path.

    Raises:
        ValueError: for a batch size that is no number, and without a path.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        batch_size: int | str = 1,
        replies: str | Path | None = None,
        pretrained: str | Path | None = None,
        **kwargs,
    ):
        super().__init__()
        from accelerate import Accelerator

        if (path is None) == (pretrained is None):
            raise ValueError("Say which model it is, with path=FOLDER or pretrained=FOLDER, and not both.")
        path = pretrained if path is None else path

        kwargs.pop("max_batch_size", None)
        if kwargs.get("chat_template") is not None:
            kwargs["chat_template"] = read_chat_template(kwargs["chat_template"])
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.batch_size = whole_number(batch_size, "batch_size")
        if replies is not None:
            parts = (path, *(kwargs.get(part) for part in ("processor", "tokenizer", "tokenizer_reference")))
            options = {name: value for name, value in kwargs.items() if not name.startswith("media_store")}
            made_from = MadeFrom({str(part): state_of_model(part) for part in parts if part}, options)
            self.replies = ReplyLog(replies, self._rank, context=made_from.to_json())
            if self._rank == 0:
                _say_what_changed(Path(replies), made_from)
        if kwargs.get("device") is None:
            kwargs["device"] = str(self.device)
        self._loading = {"path": path, **kwargs}

    @cached_property
    def conversation_model(self) -> ConversationModel:
        """The model, loaded."""
        return ConversationModel(**self._loading)

    @property
    def window(self) -> int:
        # pixels of an OtterHD wait as they are
        batches = 2 if isinstance(self.processor, OtterHDProcessor) else 8
        return batches * self.batch_size

    @cached_property
    def processor(self):
        """The model's processor."""
        names = ("tokenizer", "tokenizer_reference")
        name = str(self._loading.get("processor") or self._loading["path"])
        return read_processor(name, *(self._loading.get(option) for option in names))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool, int]]:
        """
        Mean loss per token, whether greedy decoding would give the candidate, and the number of tokens. lmms-eval
        0.7.3 takes the *smallest* number for the answer, whatever its name says.
        """
        # all candidates of a question together: its pictures are then read once
        questions = []
        requests = [self._controlled(request) for request in requests]
        for _, group in groupby(requests, key=lambda request: (request.args[0], request.args[3:])):
            group = list(group)
            candidates = [request.args[1].lstrip() for request in group]
            questions.append((partial(self._conversation, group[0]), candidates))
        scored = self.rank_candidates(questions)
        return [(-total / count, greedy, count) for scores in scored for total, count, greedy in scores]

    def answer_questions(
        self, questions: Sequence[Callable[[], list[dict]]], options: Mapping, chat_template: str | None = None
    ) -> list[str]:
        """
        The answers to conversations, each of which a function returns, so that pictures are read when they are needed.

        Args:
            options: of the answers, see [`ConversationModel.generate`].
            chat_template: in place of the model's.
        """

        def ask(window: list, wanted: set[int]) -> Iterator[dict]:
            conversations = (conversation() for conversation in window)
            size = self.batch_size
            seed = torch.initial_seed()
            return self.conversation_model.answers(conversations, (), chat_template, size, wanted, seed, **options)

        return self.answer(questions, lambda conversation: [conversation(), options, chat_template], ask)

    def rank_candidates(
        self, questions: list[tuple[Callable[[], list[dict]], list[str]]], chat_template: str | None = None
    ) -> list[list[tuple[float, int, bool]]]:
        """
        For each question its candidates' summed log-probabilities, numbers of tokens, and whether each is greedy.

        Args:
            questions: as in `answer_questions`, each with its candidates.
            chat_template: in place of the model's.
        """

        def ask(window: list, wanted: set[int]) -> Iterator[dict]:
            conversations, candidates = (conversation() for conversation, _ in window), [names for _, names in window]
            size = self.batch_size
            return self.conversation_model.log_likelihoods(conversations, candidates, chat_template, size, wanted)

        return self.answer(questions, lambda item: [item[0](), item[1], chat_template], ask)

    def generate_until_multi_round(self, requests):
        """Not offered: none of the tasks here takes several rounds."""
        raise NotImplementedError("Tasks of several rounds are not supported by this adapter.")

    def _ask(self, window: list[Instance], wanted: set[int]) -> Iterator[dict[int, str]]:
        # what is asked with the same options, mostly all
        by_options = groupby(range(len(window)), key=lambda number: window[number].args[2])
        for options, numbers in ((dict(options), list(numbers)) for options, numbers in by_options):
            until, chat_template = options.pop("until", None) or [], options.pop("chat_template", None)
            until = [until] if isinstance(until, str) else until
            missing = {place for place, number in enumerate(numbers) if number in wanted}
            if not missing:
                continue
            conversations = (self.messages(window[number]) for number in numbers)
            for found in self.conversation_model.answers(
                conversations, until, chat_template, self.batch_size, missing, torch.initial_seed(), **options
            ):
                yield {numbers[place]: reply for place, reply in found.items()}

    def _conversation(self, request: Instance) -> list[dict]:
        """The conversation of a request in lmms-eval's form for rankings: text, candidate, pictures."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        content = [{"type": "image", "image": picture} for picture in pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


class Endpoint(ResumableModel, OpenAICompatible):
    """
    lmms-eval's client of OpenAI-compatible endpoints, whose replies are kept as ours are. What it could not get a
    reply to is answered with `FAILED_REQUEST`, and asked again next time.

    Args:
        replies: see [`TransformersModel`].
        generation: `max_new_tokens`, `temperature` and `top_p` of every request, over what a task asks for.
    """

    def __init__(
        self, *args, replies: str | Path | None = None, generation: Mapping[str, Any] | None = None, **kwargs
    ):
        OpenAICompatible.__init__(self, *args, **kwargs)
        self.model_version = _WholeName(self.model_version)
        self.generation = dict(generation or {})
        if replies is not None:
            context = {name: value for name, value in kwargs.items() if name in ("model", "model_version", "base_url")}
            self.replies = _RepliesOnly(replies, self.rank, context=context)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request."""
        told = []
        for request in requests:
            text, messages, options, *row = request.args
            told.append(copy.copy(request))
            told[-1].arguments = (text, messages, {**options, **self.generation}, *row)
        return super().generate_until(told)

    def answer_questions(
        self, questions: Sequence[Callable[[], list[dict]]], options: Mapping, chat_template: str | None = None
    ) -> list[str]:
        """As those to a [`TransformersModel`]; the template is the server's, and answers are greedy, without beams."""
        if left_out := {name: options[name] for name in ("num_beams", "length_penalty") if name in options}:
            logger.warning_once(
                f"OpenAI's protocol has no {', '.join(f'{name} ({value})' for name, value in left_out.items())}: "
                f"{self.model_version} is asked without, and its answers are greedy."
            )
        options = {**options, **self.generation}
        self.task_dict["questions"] = {"test": questions}
        requests = [
            Instance(
                "generate_until",
                ("", _as_lmms_eval_has_them, {**options, "until": []}, number, "questions", "test"),
                idx=0,
                metadata={"task": "questions", "doc_id": number, "repeats": 1},
            )
            for number in range(len(questions))
        ]
        return self.answer(requests, lambda request: [self.messages(request), options], self._ask)

    def loglikelihood(self, requests: list[Instance]):
        """ValueError: what no endpoint tells."""
        raise ValueError(f"{requests[0].args[-2]} ranks answers by their log-probabilities, which no endpoint gives.")

    def _ask(self, window: list[Instance], wanted: set[int]) -> Iterator[dict[int, str]]:
        numbers = sorted(wanted)  # a reply of an endpoint does not depend on who is asked with it
        replies = OpenAICompatible.generate_until(self, [window[number] for number in numbers])
        yield {number: reply.text for number, reply in zip(numbers, replies, strict=True)}


class _WholeName(str):
    """
    The name of a model. lmms-eval 0.7.3 looks for `o3` and the like in it, and takes a served `flamingo3b` for one of
    OpenAI's that think, which is told no temperature; here the whole word counts.
    """

    def __contains__(self, word: str) -> bool:
        return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", self) is not None


def _as_lmms_eval_has_them(conversation: Callable[[], list[dict]]) -> list[dict]:
    """The messages that a function returns, with pictures under the name that lmms-eval has for them."""
    return [
        {
            **message,
            "content": [{**part, "url": part["image"]} if "image" in part else part for part in message["content"]],
        }
        for message in conversation()
    ]


def _say_what_changed(folder: Path, made_from: MadeFrom) -> None:
    before = kept(folder).get("model")
    if before is not None and (changes := made_from.changes(before)):
        logger.warning(f"{changes}: everything is asked anew, the replies in {folder} are of another model.")
    keep(folder, {"model": made_from})


class _RepliesOnly(ReplyLog):
    def add(self, replies: dict[str, str]) -> None:
        super().add({key: text for key, text in replies.items() if text and not text.startswith(FAILED_REQUEST)})


def manifests() -> list[ModelManifest]:
    """What the entry point tells lmms-eval: one adapter under the names of the families."""
    path = f"{__name__}.{TransformersModel.__name__}"
    return [ModelManifest("otter", chat_class_path=path, aliases=("flamingo", "otterhd", "transformers_vlm"))]
