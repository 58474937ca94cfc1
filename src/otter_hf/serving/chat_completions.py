"""`POST /v1/chat/completions`, within limits.

A request is a job of its own task, which holds its place in the gate until its work is over: prepared in a thread,
answered as a row of its model's batch. The HTTP side only reads what the job says and may leave at any time.
"""

import asyncio
import functools
import secrets
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from starlette.requests import ClientDisconnect
from transformers import Cache, LogitsProcessorList, StoppingCriteriaList
from transformers.cli.serving.utils import GenerationState
from transformers.utils import logging

from ..models.continuous_batching import ContinuousBatch, can_batch
from ..models.flamingo import FlamingoForConditionalGeneration
from ..models.generation import context_length, end_tokens
from ..models.media_store import MediaStore
from ..models.prefix_store import PrefixStore
from ..models.skills import Skill
from .answer import Answer
from .batch_thread import BatchThread
from .body import BodyReader
from .errors import ContextLengthExceeded, Refused, error_body, has_lost_device
from .gate import Gate, QueueFull, Ticket
from .generation import RepeatPenalty, StopWhenCancelled, config_of
from .logprobs import TokenLogprobs
from .media import fit_media
from .messages import Cancelled, MessageReader
from .metrics import Metrics
from .models import ServedModels
from .request import ChatOptions, check_request, unknown_field
from .responses import Piece, choice_of, chunk, completion, event, first_choice
from .settings import ServerSettings


logger = logging.get_logger(__name__)

# requests whose pictures are decoded at a time: each thread keeps memory of the largest it has decoded
_PREPARERS = 2
# of encoded pictures that are kept for requests to come
_MEDIA_BYTES = 2**27


class ClientGone(Exception):
    """Nobody is there to read the answer."""


class ChatJob:
    """
    One request between the HTTP side and its work.

    `items` holds what there is to say: first `None` when all checks have passed, then each [`Piece`]; or an exception.
    `cancelled` tells the work to stop.
    """

    def __init__(self, body: dict, options: ChatOptions, ticket: Ticket):
        self.body = body
        self.options = options
        self.ticket = ticket
        self.items: asyncio.Queue = asyncio.Queue()
        self.cancelled = threading.Event()
        self.waiting = False
        self.task: asyncio.Task | None = None
        self.skill: Skill | None = None
        self.prompt_tokens = self.new_tokens = 0
        self.unfinished = options.choices
        self.known_tokens = 0  # of the prompt, which were not read again

    def usage(self) -> CompletionUsage:
        """The numbers of tokens so far."""
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.new_tokens,
            total_tokens=self.prompt_tokens + self.new_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.known_tokens),
        )

    def leave(self) -> None:
        """Nobody reads on."""
        self.cancelled.set()
        if self.waiting and self.task is not None:
            self.task.cancel()


class ChatCompletions:
    """
    Answers chat completion requests; see `ServerSettings` for the limits.

    Args:
        models: the models of this server.
        settings: its limits.
        metrics: counts requests and tokens.
    """

    def __init__(self, models: ServedModels, settings: ServerSettings, metrics: Metrics):
        self.model_manager = models
        self.generation_state = GenerationState()
        self.settings = settings
        self.metrics = metrics
        self.gate = Gate(settings.slots, settings.queue)
        places = settings.slots + settings.queue
        self.bodies = BodyReader(settings.body_bytes, places * settings.body_bytes, settings.body_seconds)
        # one for each place, as a slow site holds its thread; not a slot, in which others could be answered
        self._fetchers = ThreadPoolExecutor(places, thread_name_prefix="fetch")
        # those who wait for what others read, see `PrefixStore`, leave the threads of the loop to requests that arrive
        self._submitters = ThreadPoolExecutor(settings.slots, thread_name_prefix="submit")
        self._preparers = ThreadPoolExecutor(min(settings.slots, _PREPARERS), thread_name_prefix="prepare")
        self._tasks: set[asyncio.Task] = set()  # the event loop itself would let them be collected
        self._lost_device: str | None = None  # the error with which it was lost

    def check_device(self) -> None:
        """Raise HTTPException 503 once an error has left the server without its device."""
        if self._lost_device is not None:
            raise HTTPException(503, f"The device of this server failed, restart the server: {self._lost_device}.")

    def gauges(self) -> dict[str, int]:
        """What [`Metrics`] shows of this moment."""
        batches = self.model_manager.batches
        return {
            "otter_running": self.gate.running,
            "otter_waiting": self.gate.admitted - self.gate.running,
            "otter_batch_rows": sum(batch.num_running for batch in batches),
            "otter_batch_waiting": sum(batch.num_waiting for batch in batches),
            "otter_batch_tokens": sum(batch.tokens_taken for batch in batches),
        }

    # ----- the HTTP side -----

    async def respond(self, request: Request) -> Response:
        """
        Args:
            request: the HTTP request.

        Raises:
            HTTPException: 400 for what is wrong with the request, 404 for another model, 422 for unknown fields, 429
                when too many wait, 503 where the device's memory is full or the device failed, 504 when it takes too
                long; as `BodyReader.read` for its body.
        """
        started = time.monotonic()
        self.check_device()
        try:
            self.gate.check()  # before the body is read
            body = await self.bodies.read(request)
            if unknown := unknown_field(body):
                raise HTTPException(422, unknown)
            options = check_request(body)
            if options.choices > self.settings.slots:
                raise ValueError(f"n is {options.choices}; this server gives at most {self.settings.slots} at a time.")
            body["model"] = self.model_manager.find(body.get("model"))
            ticket = self.gate.admit()
        except ClientDisconnect:
            raise ClientGone from None
        except QueueFull:
            raise HTTPException(
                429, "Too many requests are waiting; try again in a moment.", headers={"Retry-After": "1"}
            ) from None
        except KeyError as error:
            raise HTTPException(404, self.model_manager.refusal_of(error.args[0])) from error
        except ValueError as error:
            raise Refused(error) from error
        job = ChatJob(body, options, ticket)
        job.task = asyncio.create_task(self._work(job))
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)
        reader = _Reader(job, request, started + self.settings.request_seconds)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        ends_with_response = False
        try:
            await reader.next()
            if body.get("stream"):
                ends_with_response = True
                return _EventStream(self._events(reader, request_id), lambda: self._end(reader, started))
            pieces = [piece async for piece in reader]
            return JSONResponse(completion(request_id, body["model"], pieces, options.top_logprobs is not None))
        finally:
            if not ends_with_response:
                self._end(reader, started)

    def _end(self, reader: "_Reader", started: float) -> None:
        reader.close()
        self.metrics.add("otter_request_seconds_total", time.monotonic() - started)
        if reader.client_is_gone:
            self.metrics.add("otter_cancelled_total")

    async def _events(self, reader: "_Reader", request_id: str):
        job, say = reader.job, functools.partial(chunk, request_id, reader.job.body["model"])
        for number in range(job.options.choices):
            yield say(first_choice(number))
        try:
            async for piece in reader:
                usage = None if job.options.usage_apart else piece.usage
                if piece.finish is None and job.options.usage_so_far:
                    usage = job.usage()
                yield say(choice_of(piece), usage=usage)
                if piece.usage is not None and job.options.usage_apart:
                    yield say(usage=piece.usage)
        except HTTPException as error:
            # the status has been sent; the clients of OpenAI read an error from the stream
            yield event(error_body(error))
        except ClientGone:
            return
        yield "data: [DONE]\n\n"

    # ----- the work -----

    async def _work(self, job: ChatJob) -> None:
        try:
            loop = asyncio.get_running_loop()
            frames = job.options.num_frames or self.settings.num_frames
            reader = MessageReader(self.settings.media, self.settings.fetch, frames, job.cancelled.is_set)
            # not cancelled with the job, as its thread goes on: the place is held until that ends
            messages = await loop.run_in_executor(self._fetchers, reader.fetch, job.body.pop("messages", None))
            job.waiting = True
            if job.cancelled.is_set():
                return
            await job.ticket.take_slot()
            job.waiting = False
            prepared = await loop.run_in_executor(self._preparers, self._prepare, job, reader, messages)
            if job.cancelled.is_set():
                return
            job.items.put_nowait(None)
            await self._generate(job, *prepared)
        except Cancelled:
            pass  # nobody reads what it would say
        except (ValueError, TemplateError) as error:
            job.items.put_nowait(Refused(error))
        except torch.OutOfMemoryError:
            logger.exception("A request found no memory.")
            said = "The memory of this server's device is full: send less, or try again when fewer ask."
            job.items.put_nowait(HTTPException(503, said, headers={"Retry-After": "1"}))
        except Exception as error:
            logger.exception("A request failed.")
            if has_lost_device(error):
                self._lost_device = str(error).partition("\n")[0].strip().rstrip(".")
            job.items.put_nowait(HTTPException(500, f"The server failed to answer: {type(error).__name__}."))
        finally:
            job.ticket.release()

    def _prepare(self, job: ChatJob, reader: MessageReader, messages: list[dict]):
        """Model, processor, inputs and generation config of a request; ValueError for what is wrong with it."""
        settings, options = self.settings, job.options
        name = self.model_manager.process_model_name(self.model_manager.model_of(job.body["model"]))
        try:
            model, processor = self.model_manager.load_model_and_processor(name)
            job.skill = self.model_manager.skill_of(job.body["model"], model, processor)
        except (ValueError, OSError) as error:  # files of the server's, not what the client sent
            raise RuntimeError(f"{job.body['model']} cannot be read: {error}") from error
        messages = reader.decode(messages, getattr(processor, "num_frames", None))
        inputs = processor.apply_chat_template(
            fit_media([*(job.skill.messages if job.skill else ()), *messages], processor, settings.media),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        job.prompt_tokens = length = inputs["input_ids"].shape[1]
        context = context_length(model)
        if context is not None and length >= context:
            raise ContextLengthExceeded(
                f"The prompt has {length} tokens, but the model reads at most {context - 1}; shorten it."
            )
        config = config_of(model, job.body, options)
        if (config.num_beams or 1) > 1 and (options.choices > 1 or options.top_logprobs is not None):
            asked = f"n is {options.choices}" if options.choices > 1 else "logprobs is true"
            raise ValueError(f"{asked}, and num_beams {config.num_beams}: beams have one answer and no logprobs.")
        # beams are rows, too
        room = settings.batch_tokens // (config.num_beams or 1) - length
        if room < 1:
            raise ContextLengthExceeded(
                f"The prompt has {length} tokens, but this server has room for {room + length}, the answer included; "
                "shorten it."
            )
        if context is not None:
            room = min(room, context - length)
        config.max_new_tokens = min(config.max_new_tokens, settings.new_tokens, room)
        if options.least_tokens:
            config.min_new_tokens = min(options.least_tokens, config.max_new_tokens)
        return model, processor, inputs, config

    async def _generate(self, job: ChatJob, model, processor, inputs, config) -> None:
        name = self.model_manager.model_of(job.body["model"])
        with self.model_manager.in_use(name, model):
            if can_batch(model, config):
                batch = self.model_manager.batch_of(name, model, self._make_batch)
                loop = asyncio.get_running_loop()
                prefix = await loop.run_in_executor(self._submitters, self._prefix_of, job, batch, inputs)
                answering = functools.partial(self._answer_in_batch, job, batch, prefix)
            else:
                answering = functools.partial(self._answer_alone, job, model)
            numbers = range(job.options.choices)
            answers = [self._answer(job, number, processor, inputs, config, answering) for number in numbers]
            ended = await asyncio.gather(*answers, return_exceptions=True)
        for error in filter(None, ended):
            raise error
        if not job.cancelled.is_set():
            self.metrics.add("otter_prompt_tokens_total", job.prompt_tokens)
            self.metrics.add("otter_completion_tokens_total", job.new_tokens)

    async def _answer(
        self, job: ChatJob, number: int, processor, inputs, config, answering: Callable[..., Awaitable[list[int]]]
    ) -> None:
        """One of the answers of a request; where it fails, the others end, too."""
        loop = asyncio.get_running_loop()  # which a thread cannot reach itself
        emit = functools.partial(loop.call_soon_threadsafe, job.items.put_nowait)
        told, ends = job.options.top_logprobs, end_tokens(config)
        logprobs = None if told is None else TokenLogprobs(processor.tokenizer, told, ends)

        def say(text: str = "", **end) -> None:
            emit(Piece(number, text, logprobs.new() if logprobs else [], **end))

        answer = Answer(processor.tokenizer, job.options.stops, bool(job.body.get("stream")), say, logprobs)
        frequency, presence = (float(job.body.get(f"{name}_penalty") or 0) for name in ("frequency", "presence"))
        processors = [RepeatPenalty(job.prompt_tokens, frequency, presence)] if frequency or presence else []
        processors += [logprobs] if logprobs else []
        seed = None if job.body.get("seed") is None else job.body["seed"] + number
        try:
            new = await answering(inputs, config, processors, seed, answer)  # token ids
        except BaseException:
            job.cancelled.set()
            raise
        if job.cancelled.is_set():
            return
        answer.end()
        cut_off = not answer.stopped and len(new) >= config.max_new_tokens and new[-1] not in ends
        job.unfinished -= 1
        # behind what the answer's thread has sent
        say(finish="length" if cut_off else "stop", usage=None if job.unfinished else job.usage())

    def _prefix_of(self, job: ChatJob, batch: BatchThread, inputs) -> Cache | None:
        """What need not be read again of a prompt."""
        if job.skill is not None:
            prefix = job.skill.prefix_of(inputs)
        else:
            prefix = batch.prefix_of(inputs, job.cancelled.is_set)
        job.known_tokens = 0 if prefix is None else prefix.get_seq_length()
        if job.options.choices > 1 and job.skill is None:
            # a prompt that comes again is read by itself, for all
            prefix = batch.prefix_of(inputs, job.cancelled.is_set)
        return prefix

    async def _answer_in_batch(
        self, job: ChatJob, batch: BatchThread, prefix, inputs, config, processors, seed, answer: Answer
    ) -> list[int]:
        def take(token: int) -> bool:
            job.new_tokens += 1
            return answer.add([token])

        submit = functools.partial(
            batch.submit,
            inputs,
            config,
            prefix=prefix,
            # torch's generator is left to those that are answered alone
            seed=secrets.randbits(63) if seed is None else seed,
            logits_processor=processors,
            on_token=take,
            is_cancelled=job.cancelled.is_set,
        )
        row = await asyncio.get_running_loop().run_in_executor(self._submitters, submit)
        await asyncio.wrap_future(row.future)
        return row.tokens

    def _make_batch(self, model) -> BatchThread:
        settings = self.settings
        media = MediaStore(model, _MEDIA_BYTES) if isinstance(model, FlamingoForConditionalGeneration) else None
        batch = ContinuousBatch(model, settings.batch_tokens, settings.slots, settings.prefill_tokens, media)
        prefixes = None
        if settings.prefix_bytes:
            prefixes = PrefixStore(model, media, settings.prefix_bytes, settings.prefill_tokens)
        return BatchThread(batch, prefixes)

    async def _answer_alone(self, job: ChatJob, model, inputs, config, processors, seed, answer: Answer) -> list[int]:
        """What a batch does not have (beams), and other families: one at a time beside it."""
        inputs = inputs.to(model.device, model.dtype)

        def generate() -> torch.LongTensor:
            if job.cancelled.is_set():  # it may have waited for the model
                return inputs["input_ids"]
            if seed is not None:
                torch.manual_seed(seed)
            cache = job.skill and job.skill.cache_for(inputs, config.num_beams or 1)
            job.known_tokens = cache.get_seq_length() if cache else 0
            return model.generate(
                **inputs,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([StopWhenCancelled(job.cancelled)]),
            )

        manager = self.generation_state.get_manager(self.model_manager.model_of(job.body["model"]))
        sequences = await manager.async_submit(generate)  # (1, L + L_new)
        new = sequences[0, inputs["input_ids"].shape[1] :].tolist()
        job.new_tokens += len(new)
        answer.add(new)
        return new


class _Reader:
    """What a job says, as long as the client is there and the time lasts."""

    def __init__(self, job: ChatJob, request: Request, deadline: float):
        self.job = job
        self.deadline = deadline
        self._finished = False
        self._gone = asyncio.create_task(_disconnected(request))

    async def next(self):
        """The next item. Raises HTTPException for an error and after too long a time, ClientGone."""
        item = asyncio.ensure_future(self.job.items.get())
        try:
            timeout = max(self.deadline - time.monotonic(), 0)
            await asyncio.wait({item, self._gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if item.done():
                if isinstance(item.result(), Exception):
                    raise item.result()
                return item.result()
            if self._gone.done():
                raise ClientGone
            # OpenAI's client would ask again by itself, and wait as long
            raise HTTPException(504, "The answer was not finished in time.", headers={"X-Should-Retry": "false"})
        finally:
            item.cancel()

    async def __aiter__(self):
        """Each [`Piece`]."""
        while not self._finished:
            piece = await self.next()
            self._finished = piece.usage is not None
            yield piece

    @property
    def client_is_gone(self) -> bool:
        """Whether the client left before the end of the answer."""
        return not self._finished and self._gone.done() and not self._gone.cancelled()

    def close(self) -> None:
        """Read no more."""
        self._gone.cancel()
        self.job.leave()


class _EventStream(StreamingResponse):
    """Server-sent events that are ended in every case, even if the client left before the first of them."""

    def __init__(self, events, end: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.end = end

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
