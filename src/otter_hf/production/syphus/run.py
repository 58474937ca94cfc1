"""A run: its queries, asked many at a time within a budget, and taken up again where it ended."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...files import claim, disk_full_told, fetched, replacing, write_text
from ...made_from import MadeFrom
from ...storage import AnyPath, to_path
from .budget import Budget, RunSummary
from .client import (
    ChatClient,
    ChatReply,
    EndpointError,
    RejectedError,
    TransientError,
    check_address,
    request_options,
)
from .datasets import SyphusDataset, find_dataset
from .journal import Journal
from .pictures import PictureOptions, QueryPictures
from .prompts import Prompt, load_prompt, parse_prompt
from .queries import Query


logger = logging.get_logger(__name__)

# estimates for endpoints that do not count
_BYTES_PER_TOKEN = 4
_TOKENS_OF_PICTURE = 1000
_LONGEST_PAUSE = 300.0
_FAILURES_IN_A_ROW = 20


class SyphusRun:
    """A folder with the queries of a run, `queries.jsonl`, what came of them, `journal.jsonl`, and `run.json`.

    A new run is made by `create`, which writes the queries down, so that later calls ask the same ones whatever
    becomes of the annotations. The key of the endpoint is nowhere in the folder.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        ValueError: if its files are damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "run.json"
        if not path.exists():
            raise FileNotFoundError(f"There is no run in {folder}: `otter-hf syphus run` makes one.")
        try:
            self.settings = json.loads(path.read_text(encoding="utf-8"))
            dataset, prompt = self.settings["dataset"], self.settings["prompt"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: restore it, or begin another run.") from None
        self.dataset: SyphusDataset = find_dataset(dataset)
        self.prompt: Prompt = parse_prompt(prompt, str(path))
        shown = self.settings.get("pictures")
        self.pictures = None if shown is None else QueryPictures(PictureOptions(**shown), self.dataset)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        dataset: str,
        annotations: AnyPath,
        model: str,
        *,
        prompt: str | Path | Prompt | None = None,
        base_url: str | None = None,
        options: Mapping[str, Any] | None = None,
        start: int = 0,
        end: int | None = None,
        shard: tuple[int, int] = (0, 1),
        shuffle_seed: int | None = None,
        pictures: PictureOptions | None = None,
        verify: bool = False,
    ) -> "SyphusRun":
        """Makes a run of annotations.

        Args:
            dataset: the kind of annotations, such as `"video.DenseCaptions"`.
            annotations: their file; it and the image stores of `pictures` may be at addresses (`s3://bucket/x.json`).
            prompt: file or name of a prompt; default: the dataset's.
            options: options of the requests, see `ChatClient`.
            start, end: take the queries from here to there, as a slice.
            shard: `(k, n)`: of what remains, the k-th of n equal parts, counted from 0; all n together are complete.
            shuffle_seed: shuffle the queries before that.
            pictures: show the endpoint the pictures of each query; by default it is told of them in words alone.
            verify: whether pairs are only used when they are verified, see `verify`; needs `pictures`.

        Raises:
            FileExistsError: if there is a run in the folder.
            OSError: if another process is making one there.
            ValueError: if the annotations, the prompt or the address are not what they should be, or no query remains.
        """
        folder, kind = Path(folder), find_dataset(dataset)
        prompt = prompt if isinstance(prompt, Prompt) else load_prompt(prompt or kind.prompt)
        settings = {
            "dataset": dataset,
            "annotations": str(annotations),
            "model": model,
            "base_url": base_url,
            "options": dict(options or {}),
            "selection": {"start": start, "end": end, "shard": list(shard), "shuffle_seed": shuffle_seed},
            "prompt": prompt.to_json(),
            "pictures": None if pictures is None else pictures.to_json(),
            "verify": verify,
        }
        files = MadeFrom.of([annotations, *(() if pictures is None else pictures.stores)]).files
        if (folder / "run.json").exists():
            before = cls(folder).settings
            options_before = {name: value for name, value in before.items() if name != "made_from"}
            changes = MadeFrom(files, settings).changes(
                {"files": before.get("made_from", {}).get("files", files), "options": options_before}
            )
            if changes:
                raise FileExistsError(f"There is another run in {folder} ({changes}): choose another folder.")
            raise FileExistsError(f"There is a run in {folder}: resume it, or choose another folder.")
        if not to_path(annotations).is_file():
            raise FileNotFoundError(f"The annotations {annotations} do not exist.")
        check_address(base_url)
        request_options(options)
        if verify and (pictures is None or kind.parse is None):
            raise ValueError(f"verify needs pictures, and a kind of annotations that has them; got {dataset}.")
        if pictures is not None:
            QueryPictures(pictures, kind)  # what cannot be opened is an error now
        with fetched(annotations) as file:
            queries = _select(kind.read(file), start, end, shard, shuffle_seed)
        with claim(folder / ".lock", f"The run in {folder}"):
            if (folder / "run.json").exists():
                raise FileExistsError(f"There is a run in {folder}, made by now: resume it, or choose another folder.")
            if not _write_queries(folder / "queries.jsonl", queries):
                raise ValueError(f"No query of {annotations} is selected: check start, end and shard.")
            settings["made_from"] = MadeFrom(files).to_json()
            (folder / "journal.jsonl").touch()
            # the run is there when this file is
            write_text(folder / "run.json", json.dumps(settings, ensure_ascii=False, indent=1))
        return cls(folder)

    def changes(self) -> str:
        """
        Which of its annotations and image stores have changed since the run was made, in words; empty if none has.
        Its queries stay those that were written down then. A file that is gone has not changed.
        """
        before = self.settings.get("made_from", {"files": {}})["files"]
        here = {path: state for path, state in before.items() if to_path(path).exists()}
        return MadeFrom.of(here).changes({"files": here, "options": {}})

    def queries(self) -> Iterator[Query]:
        """The queries in their order."""
        with open(self.folder / "queries.jsonl", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    for key in ("pictures", "seconds"):
                        row[key] = None if row[key] is None else tuple(row[key])
                    query = Query(**row)
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"Line {number} of {file.name} is no query: restore the file.") from None
                yield query

    def messages(self, query: Query) -> list[dict[str, Any]]:
        """The chat that asks a query, its pictures in front of its text.

        Raises:
            RejectedError: if pictures are to be shown, and there are none of this query.
        """
        messages: list[dict[str, Any]] = self.prompt.messages(query.id, query.text)
        parts = [] if self.pictures is None else self.pictures.parts(query)
        if parts:
            messages[-1]["content"] = [*parts, {"type": "text", "text": messages[-1]["content"]}]
        return messages

    def client(self, base_url: str | None = None, api_key: str | None = None, timeout: float = 120) -> ChatClient:
        """A client of the run's model and options."""
        settings = self.settings
        return ChatClient(settings["model"], base_url or settings["base_url"], api_key, settings["options"], timeout)

    def journal(self) -> Journal:
        """The run's journal for reading, to be used as a context."""
        return Journal(self.folder / "journal.jsonl")

    @contextmanager
    def writing(self) -> Iterator[Journal]:
        """The run's journal for writing; `OSError` if another process has it."""
        with (
            claim(self.folder / ".lock", f"The run in {self.folder}"),
            disk_full_told(self.folder),
            Journal(self.folder / "journal.jsonl", writable=True) as journal,
        ):
            yield journal

    def ask(
        self,
        client: ChatClient,
        budget: Budget | None = None,
        *,
        concurrency: int = 8,
        max_attempts: int = 6,
        first_pause: float = 1.0,
        retry_failed: bool = False,
    ) -> RunSummary:
        """Asks all queries that have no reply yet.

        A reply is on disk before its thread goes on, so none is asked for twice; requests under way when the process
        is killed are asked again, and counted as `lost`. Attempts that fail in passing are repeated after a pause that
        doubles, or that the endpoint names, during which no other thread asks if the endpoint was busy (429).

        Args:
            client: anything with `complete(messages) -> ChatReply`.
            concurrency: requests at a time.
            max_attempts: attempts per query, after which it is given up.
            first_pause: seconds before the second attempt.
            retry_failed: also ask what was given up earlier, or is in a batch without result.

        Raises:
            EndpointError: if the endpoint refuses all requests, or too many queries in a row fail.
            OSError: if another process is at this run.
        """
        if concurrency < 1 or max_attempts < 1:
            raise ValueError(f"concurrency={concurrency} and max_attempts={max_attempts} must be at least 1.")
        started = time.monotonic()
        with self.writing() as journal:
            if journal.lost:
                logger.warning(f"{journal.lost} requests were under way when an earlier call ended: asked again.")
            asking = _Asking(self, client, journal, budget or Budget(), max_attempts, first_pause)
            try:
                asking.run(concurrency, retry_failed)
            finally:
                summary = self._summary(journal)
                summary.seconds, summary.stopped = time.monotonic() - started, asking.stopped
                self._write_meta(summary)
            return summary

    def summary(self) -> RunSummary:
        """Where the run stands."""
        with self.journal() as journal:
            return self._summary(journal)

    def _summary(self, journal: Journal) -> RunSummary:
        summary = RunSummary(
            queries=sum(1 for _ in self.queries()),
            replies=len(journal.replies),
            failed=len(journal.failed.keys() - journal.replies.keys()),
            in_batch=len(journal.in_batch),
            requests=journal.counts["sent"],
            errors=journal.counts["error"],
            lost=journal.lost,
            prompt_tokens=journal.prompt_tokens,
            completion_tokens=journal.completion_tokens,
            cost=journal.cost,
        )
        summary.pending = summary.queries - summary.replies - summary.failed - summary.in_batch
        for id, reason in journal.failed.items():
            if id not in journal.replies:
                summary.reasons[reason] = summary.reasons.get(reason, 0) + 1
        return summary

    def _write_meta(self, summary: RunSummary) -> None:
        """`meta.json`, with the names of the original where it has them."""
        meta = {
            "completion_tokens": summary.completion_tokens,
            "prompt_tokens": summary.prompt_tokens,
            "total_tokens": summary.prompt_tokens + summary.completion_tokens,
            "valid_outputs": summary.replies,
            "invalid_outputs": summary.failed,
            "error_messages": summary.reasons,
            "time": summary.seconds,
            "total_examples": summary.queries,
            "cost": summary.cost,
            "requests": summary.requests,
            "lost_requests": summary.lost,
        }
        write_text(self.folder / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))


class _Asking:
    """One call of `SyphusRun.ask`."""

    def __init__(self, run: SyphusRun, client, journal: Journal, budget: Budget, max_attempts: int, pause: float):
        self.syphus, self.client, self.journal, self.budget = run, client, journal, budget
        self.max_attempts, self.first_pause = max_attempts, pause
        self.stopped: str | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._under_way = 0
        self._failures = 0  # queries given up since the last reply
        self._not_before = 0.0

    def run(self, concurrency: int, retry_failed: bool) -> None:
        settled = self.journal.is_settled
        pending = (query for query in self.syphus.queries() if not settled(query.id, retry_failed))
        with (
            ThreadPoolExecutor(concurrency) as pool,
            logging.tqdm(desc="Asking", total=None, unit=" queries") as bar,
        ):
            futures = [pool.submit(self._work, pending, bar) for _ in range(concurrency)]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                self.stopped = str(error) or type(error).__name__
                raise
            finally:
                self._stop.set()

    def _work(self, pending: Iterator[Query], bar) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    query = next(pending, None)
                if query is None:
                    return
                self._ask(query)
                with self._lock:
                    bar.update()
        except BaseException:
            self._stop.set()  # before the pool waits for the others
            raise

    def _ask(self, query: Query) -> None:
        try:
            messages, pause = self.syphus.messages(query), self.first_pause
        except RejectedError as error:
            self.journal.append("failed", query.id, reason=str(error))  # nothing was asked
            return
        for attempt in range(1, self.max_attempts + 1):
            self._stop.wait(max(0.0, self._not_before - time.monotonic()))
            if not self._begin(query.id):
                return
            try:
                self._attempt(query.id, messages, attempt)
                return
            except TransientError as error:
                reason, delay = str(error), error.retry_after
            except RejectedError as error:
                reason = str(error)
                break
            if delay is None:
                # not all threads at the same time
                delay, pause = pause * random.uniform(0.5, 1), 2 * pause
            else:
                delay = min(delay, _LONGEST_PAUSE)
                self._not_before = max(self._not_before, time.monotonic() + delay)
            if attempt < self.max_attempts and self._stop.wait(delay):
                return
        self._give_up(query.id, reason)

    def _attempt(self, id: str, messages: list[dict[str, Any]], attempt: int) -> None:
        started = time.monotonic()
        try:
            reply = self.client.complete(messages)
            fields = reply_fields(reply, lambda: messages, self.budget)
            self.journal.append("reply", id, attempt=attempt, seconds=round(time.monotonic() - started, 3), **fields)
            self._failures = 0
        except (TransientError, RejectedError, EndpointError) as error:
            self.journal.append(
                "error", id, reason=str(error), attempt=attempt, **charged(error, lambda: messages, self.budget)
            )
            raise
        finally:
            with self._lock:
                self._under_way -= 1

    def _begin(self, id: str) -> bool:
        """Books a request, unless the run is to end."""
        with self._lock:
            if self._stop.is_set():
                return False
            limit = self.budget.exhausted(self.journal, self._under_way)
            if limit:
                self.stopped = f"budget: {limit}"
                self._stop.set()
                return False
            self._under_way += 1
            # a kill leaves what was written; only a crash of the machine may lose it
            self.journal.append("sent", id, durable=False)
            return True

    def _give_up(self, id: str, reason: str) -> None:
        self.journal.append("failed", id, reason=reason)
        with self._lock:
            self._failures += 1
            if self._failures >= _FAILURES_IN_A_ROW:
                raise EndpointError(f"{self._failures} queries in a row failed, the last with: {reason}.")


def reply_fields(reply: ChatReply, ask: Callable[[], list[dict[str, Any]]], budget: Budget) -> dict[str, Any]:
    """What the journal keeps of a reply; tokens that the endpoint does not count are estimated from what `ask` gives.

    The estimate is 4 bytes of text for a token, and 1,000 tokens for a picture.
    """
    prompt, completion = reply.prompt_tokens, reply.completion_tokens
    estimated = prompt is None or completion is None
    if estimated:
        prompt = sum(_tokens(message["content"]) for message in ask())
        completion = _tokens(reply.text)
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": budget.cost(prompt, completion),
        **({"estimated": True} if estimated else {}),
    }


def charged(error: Exception, ask: Callable[[], list[dict[str, Any]]], budget: Budget) -> dict[str, Any]:
    """What the journal keeps of a reply that holds no answer: its tokens count, its text does not."""
    reply = getattr(error, "reply", None)
    if reply is None:
        return {}
    return {key: value for key, value in reply_fields(reply, ask, budget).items() if key != "text"}


def _tokens(content: str | list[dict[str, Any]]) -> int:
    if isinstance(content, list):
        return sum(_tokens(part["text"]) if part["type"] == "text" else _TOKENS_OF_PICTURE for part in content)
    return -(-len(content.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _select(
    queries: Iterator[Query], start: int, end: int | None, shard: tuple[int, int], shuffle_seed: int | None
) -> list[Query]:
    number, total = shard
    if not 0 <= number < total:
        raise ValueError(f"shard must be (k, n) with 0 <= k < n, got {shard}.")
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"start and end must be 0 <= start <= end, got {start} and {end}.")
    if shuffle_seed is not None:
        shuffled = list(queries)
        random.Random(shuffle_seed).shuffle(shuffled)
        queries = iter(shuffled)
    selected = list(islice(queries, start, end))
    return selected[number * len(selected) // total : (number + 1) * len(selected) // total]


def _write_queries(path: Path, queries: list[Query]) -> int:
    seen: set[str] = set()
    with replacing(path) as written, open(written, "w", encoding="utf-8", errors="replace") as file:
        for query in queries:
            if query.id in seen:
                raise ValueError(f"The annotations have two records {query.id!r}: ids must be unique.")
            seen.add(query.id)
            file.write(json.dumps(asdict(query), ensure_ascii=False) + "\n")
    return len(seen)
