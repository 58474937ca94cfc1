"""A run without an endpoint: a command answers its batch files, on an engine."""

import json
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from ...data.engine import Engine
from ...data.engine import run as run_all
from ...files import claim, remove, replacing
from .batch import MAX_REQUESTS, custom_id, read_batch_results, write_batch_files
from .budget import Budget, RunSummary
from .run import SyphusRun


VLLM = "vllm run-batch --input-file {input} --output-file {output} --model {model}"


def answer_offline(
    run: SyphusRun,
    command: str = VLLM,
    *,
    engine: Engine | None = None,
    budget: Budget | None = None,
    max_requests: int = MAX_REQUESTS,
    retry_failed: bool = False,
) -> RunSummary | None:
    """Writes batch files for all queries without reply, has a command answer them, and takes up the results.

    The results of `requests-<n>.jsonl` are `results-<n>.jsonl` beside it, which has its name when the command has come
    to its end. Called again, it goes on with the files that have no results, or whose results were deleted.

    Args:
        command: words as for a shell, which does not run them; `{input}` and `{output}` stand for the files, `{model}`
            for the name of the run's model. Default: vLLM's batch runner.
        engine: where the command runs, a file at a time; default: here, one after the other.
        budget: prices of tokens, for the books.
        max_requests: in a file.
        retry_failed: write also what was given up, and what is in a file without result, to new files, which are then
            answered in place of the old ones.

    Returns:
        Where the run stands; None if the rest was handed to Slurm.

    Raises:
        ValueError: if the command does not name its files, there is no such program, or it fails.
        OSError: if another process is at this run.
    """
    words = _words(command, "requests", "results", run.settings["model"])
    if not {"requests", "results"} <= {part for word in words for part in word.split("=")}:
        raise ValueError(f"The command must hold {{input}} and {{output}}, as in {VLLM!r}; got {command!r}.")
    folder = run.folder / "batch"
    with claim(folder / ".lock", f"The batch files of {run.folder}"):
        if retry_failed:  # what has been answered meanwhile is no failure
            read_batch_results(run, _there(map(str, _waiting(run))), budget)
        write_batch_files(run, max_requests=max_requests, retry_failed=retry_failed)
        items = {path.stem: str(path) for path in _waiting(run)}
        for name, requests in items.items():
            if not _results(requests).exists():
                remove(folder / ".answered" / f"{name}.json")
        step = partial(_answer, command=command, model=run.settings["model"])
        finish = partial(_take_up, run.folder, sorted(items.values()), budget)
        if not run_all(step, items, folder / ".answered", engine or Engine(), name="Batch files", finish=finish):
            return None
    return finish()


def _words(command: str, requests: str, results: str, model: str) -> list[str]:
    names = {"input": requests, "output": results, "model": model}
    try:
        words = [word.format(**names) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"The command {command!r} cannot be read ({error}): it may hold {{input}}, {{output}} and {{model}}."
        ) from None
    if not words:
        raise ValueError("The command is empty.")
    return words


def _waiting(run: SyphusRun) -> list[Path]:
    """The batch files with a request that has no result yet; of a request in several files, the newest counts."""
    with run.journal() as journal:
        waiting = {custom_id(n, query.id) for n, query in enumerate(run.queries()) if query.id in journal.in_batch}
        paths = [run.folder / "batch" / name for name in sorted(journal.batch_files, reverse=True)]
    found = []
    for path in paths:
        if waiting and (ids := waiting & _ids(path)):
            found.append(path)
            waiting -= ids
    return found[::-1]


def _ids(path: Path) -> set[str]:
    with open(path, encoding="utf-8") as file:
        return {json.loads(line)["custom_id"] for line in file}


def _results(requests: str) -> Path:
    path = Path(requests)
    return path.with_name(path.name.replace("requests-", "results-"))


def _there(requests: Iterable[str]) -> list[Path]:
    """The results that there are of these files."""
    return [path for path in map(_results, requests) if path.exists()]


def _answer(requests: str, stop: Event, command: str, model: str) -> dict[str, Any]:
    """Runs the command on a batch file, unless there are results of it."""
    results = _results(requests)
    if not results.exists():
        with replacing(results, shared=True) as written:
            words = _words(command, requests, str(written), model)
            try:
                status = subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode
            except OSError as error:
                raise ValueError(f"The command {words[0]} cannot be run ({error.strerror}).") from None
            if status or not written.is_file():
                why = f"ended with status {status}" if status else "wrote no results"
                raise ValueError(f"The command {words[0]} {why} for {requests}; its own messages are above.")
    with open(results, "rb") as file:
        return {"requests": sum(1 for _ in file)}


def _take_up(folder: Path, requests: Sequence[str], budget: Budget | None) -> RunSummary:
    run = SyphusRun(folder)
    for path in (folder / "batch").glob(".results-*.incomplete"):  # of commands that were killed
        remove(path)
    read_batch_results(run, _there(requests), budget)
    return run.summary()


__all__ = ["VLLM", "answer_offline"]
