"""Files of OpenAI's batch API, which providers and `vllm run-batch` take: a run without an endpoint at hand."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...files import replacing
from .client import RejectedError, TransientError, read_completion, request_options
from .journal import Journal
from .queries import Query
from .run import Budget, RunSummary, SyphusRun, charged, reply_fields


# OpenAI's limits for one file
MAX_REQUESTS = 50_000
MAX_BYTES = 200_000_000


def write_batch_files(
    run: SyphusRun, *, max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES, retry_failed: bool = False
) -> list[Path]:
    """Writes the requests of all queries without reply as `<run>/batch/requests-<n>.jsonl`.

    A line is `{"custom_id", "method", "url", "body"}`. `ask` leaves queries alone that are in a file, unless it is to
    retry. A file is complete when it has its name.

    Args:
        max_requests: requests in a file, at most.
        max_bytes: size of a file, at most.
        retry_failed: also those given up, and those in an earlier file without result.

    Raises:
        OSError: if another process is at this run.
    """
    folder = run.folder / "batch"
    folder.mkdir(exist_ok=True)
    written = []
    with run.writing() as journal:
        for ids, lines in _files(_pending(run, journal, retry_failed), max_requests, max_bytes):
            path = folder / f"requests-{len(journal.batch_files):05d}.jsonl"
            with replacing(path) as incomplete:
                incomplete.write_bytes(b"".join(lines))
            # until then the file has no number of its own: the next call writes it again
            journal.append("batch", path.name, ids=ids)
            written.append(path)
    return written


def _files(
    requests: Iterable[tuple[str, bytes]], max_requests: int, max_bytes: int
) -> Iterator[tuple[list[str], list[bytes]]]:
    ids: list[str] = []
    lines: list[bytes] = []
    size = 0
    for id, line in requests:
        if ids and (len(ids) == max_requests or size + len(line) > max_bytes):
            yield ids, lines
            ids, lines, size = [], [], 0
        ids.append(id)
        lines.append(line)
        size += len(line)
    if ids:
        yield ids, lines


def _pending(run: SyphusRun, journal: Journal, retry_failed: bool) -> Iterator[tuple[str, bytes]]:
    options = request_options(run.settings["options"])
    for number, query in enumerate(run.queries()):
        if not journal.is_settled(query.id, retry_failed):
            try:
                messages = run.messages(query)
            except RejectedError as error:
                journal.append("failed", query.id, reason=str(error))
                continue
            body = {"model": run.settings["model"], "messages": messages, **options}
            request = {"custom_id": custom_id(number, query.id), "method": "POST", "url": "/v1/chat/completions"}
            yield (
                query.id,
                json.dumps({**request, "body": body}, ensure_ascii=False).encode("utf-8", "replace") + b"\n",
            )


def custom_id(number: int, id: str) -> str:
    """Names a request in a batch file: ids may be longer than providers allow, and numbers alone fit any run."""
    return f"{number}-{blake2b(id.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"


def read_batch_results(
    run: SyphusRun, paths: Sequence[str | Path], budget: Budget | None = None
) -> tuple[RunSummary, int]:
    """Takes the results of batches, and their error files, to the journal; those known already are passed over.

    Returns:
        Where the run stands, and how many results were new.

    Raises:
        ValueError: naming the file and line, if one is no result or belongs to another run; nothing is taken then.
        OSError: if another process is at this run.
    """
    known = {custom_id(number, query.id): query for number, query in enumerate(run.queries())}
    for path in paths:
        for number, result in _results(path):
            if result.get("custom_id") not in known:
                raise ValueError(
                    f"Line {number} of {path} answers request {result.get('custom_id')!r}, which is not of the run in "
                    f"{run.folder}."
                )
    new = 0
    with run.writing() as journal:
        for path in paths:
            for _, result in _results(path):
                query = known[result["custom_id"]]
                if query.id not in journal.replies:
                    new += _take(result, query, run, journal, budget or Budget())
    return run.summary(), new


def _results(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    result = json.loads(line)
                    if not isinstance(result, dict):
                        raise ValueError
                except ValueError:
                    raise ValueError(f"Line {number} of {path} is no result of a batch.") from None
                yield number, result


def _take(result: dict[str, Any], query: Query, run: SyphusRun, journal: Journal, budget: Budget) -> bool:
    """Takes a result to the journal, unless it is a failure that is there already; whether it was new."""
    response = result.get("response")
    response = response if isinstance(response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    try:
        if status != 200:
            raise TransientError(f"HTTP {status}: {_message(result.get('error') or body)}")
        reply = read_completion(body)
    except (TransientError, RejectedError) as error:
        if journal.failed.get(query.id) == str(error):
            return False
        spent = charged(error, partial(run.messages, query), budget)
        if spent:
            journal.append("error", query.id, reason=str(error), durable=False, **spent)
        journal.append("failed", query.id, reason=str(error), durable=False)
        return True
    # the file with the results is still there after a crash
    journal.append("reply", query.id, durable=False, **reply_fields(reply, partial(run.messages, query), budget))
    return True


def _message(error: Any) -> str:
    if isinstance(error, dict):
        return _message(error.get("error") or error.get("message"))
    return str(error)[:200]
