"""Conversions of many items on an engine, datatrove: ours is what is done with one item, here or anywhere."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any

from transformers.utils import logging

from ..errors import did_you_mean
from ..extras import missing
from ..files import replacing
from ..storage import AnyPath, forget_listings, to_path


logger = logging.get_logger(__name__)

EXECUTORS = ("local", "slurm", "ray")


@dataclass(frozen=True)
class Engine:
    """
    Where a conversion runs, and in how many parts.

    What is written does not depend on any of this. With one worker here, nothing else is needed; more of them, Slurm
    and Ray are those of datatrove, which divides the items into tasks, marks those that are complete, and keeps logs
    and statistics of each.

    Args:
        executor: `"local"`, processes of this machine; `"slurm"`, an array job; `"ray"`, the Ray cluster that this
            machine belongs to, or a new one of this machine. All machines must reach the files by the same names.
        tasks: parts, each with every `tasks`-th item; default: 4 for each worker, but at most one for each item. Not
            for one worker here.
        workers: tasks at a time.
        threads: items at a time, of each worker.
        logging_dir: for the engine's logs, marks and statistics, a folder or an address; default: `.engine` beside
            what is written.
        options: of datatrove's executor, by name: for Slurm at least `time` and `partition`.

    Raises:
        ValueError: for an executor that is none, numbers below 1, or what one worker here has no use for.
    """

    executor: str = "local"
    tasks: int | None = None
    workers: int = 1
    threads: int = 1
    logging_dir: str | Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {self.executor!r}.")
        for name in ("tasks", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.options and self.is_plain:
            raise ValueError(f"The options {', '.join(self.options)} are of an executor: one worker here has none.")
        if self.tasks is not None and self.is_plain:
            raise ValueError(
                f"tasks={self.tasks} divides the work among workers, and one worker here does all of it: raise "
                "workers, or leave tasks out."
            )

    @property
    def is_plain(self) -> bool:
        """Whether all is done in this process."""
        return self.executor == "local" and self.workers == 1 and self.logging_dir is None

    def check_options(self, executor: type) -> None:
        """`ValueError` for options that a class of datatrove's executors has not, or that are settings here."""
        own = {"pipeline", "logging_dir", "tasks", "workers", "depends", "skip_completed", "self"}
        known = sorted(inspect.signature(executor.__init__).parameters.keys() - own)
        for option in self.options:
            if option not in known:
                raise ValueError(
                    f"{option!r} is no option of the executor {self.executor}; {did_you_mean(option, known)}"
                )


def run(
    step: Callable[[Any, Event], Mapping[str, Any]],
    items: Mapping[str, Any],
    records: AnyPath,
    engine: Engine,
    *,
    name: str,
    finish: Callable[[], Any] | None = None,
) -> bool:
    """
    Runs `step(item, stop)` for all items that have no record, wherever the engine says.

    A record, `records/NAME.json`, is what the step gave, and is there when all that the step has written is. An item
    that was interrupted, by a kill of any process or machine, is worked on again, from its beginning. It may even be
    at work twice for a while, when a machine is given up that lives: a step writes with
    [`files.replacing`](`shared=True`), the same each time.

    Args:
        step: can be pickled; gives what JSON can hold. `stop` is a `threading.Event`, set when another item has failed
            or somebody has pressed Ctrl-C: a step that takes long looks at it, and ends with an error.
        items: by name, in an order that does not change; what can be pickled.
        records: a folder.
        name: of what is done, for logs and jobs.
        finish: what comes behind all of it; is called by a job behind the others if they are Slurm's, else not.

    Returns:
        Whether all of it is done: not when it was handed to Slurm.

    Raises:
        ValueError: if the engine is not installed, or has no such option; and what the step raises.
    """
    work = Work(step, dict(items), to_path(records), engine.threads, name)
    if not work.items:
        pass
    elif engine.is_plain:
        with logging.tqdm(desc=name, total=len(work.items)) as bar:
            for _ in work.run(work.items):
                bar.update()
    else:
        try:
            from .executors import execute
        except ImportError:
            raise ValueError(missing(f"more than one worker ({engine.executor})", "scale")) from None
        done = execute(work, engine, finish)
        forget_listings(work.records)
        return done
    return True


class Work:
    """
    The items of a conversion and what is done with each: a step of datatrove's pipelines.

    Args:
        step, items, records, threads, name: see `run`.
    """

    def __init__(self, step, items: dict[str, Any], records: AnyPath, threads: int, name: str):
        self.step, self.items, self.records, self.threads, self.name = step, items, records, threads, name
        self.stats: Any = None  # datatrove's

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Works on every `world_size`-th item from number `rank` on, and tells the statistics of it."""
        self.stats = type(self.stats)(self.name)  # of this task alone
        results = self.run(list(self.items)[rank::world_size])
        while True:
            with self.stats.time_stats:
                result = next(results, None)
            if result is None:
                break
            self.stats["items"].update(1)
            for key, value in result.items():
                if isinstance(value, int):
                    self.stats[key].update(value, unit="item")

    def __repr__(self) -> str:
        return f"{self.name}: {len(self.items)} items"

    def run(self, names: list[str] | Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """What became of the items of these names that have no record yet, one after the other as they are done."""
        stop = Event()
        if self.threads == 1:
            yield from filter(None, (self._one(name, stop) for name in names))
            return
        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(self._one, name, stop) for name in names]
            try:
                yield from filter(None, (future.result() for future in as_completed(futures)))
            except BaseException:
                stop.set()
                raise

    def _one(self, name: str, stop: Event) -> Mapping[str, Any] | None:
        path = self.records / f"{name}.json"
        if stop.is_set() or path.exists():
            return None
        result = self.step(self.items[name], stop)
        with replacing(path, shared=True) as written:
            written.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8", errors="replace")
        return result

    def missing(self) -> list[str]:
        """Names of items without a record."""
        forget_listings(self.records)
        there = {path.name for path in self.records.glob("*.json")} if self.records.is_dir() else ()
        return [name for name in self.items if f"{name}.json" not in there]

    def digest(self, tasks: int) -> str:
        """Names the division of these items into so many tasks: the marks of another one say nothing of this."""
        names = json.dumps([tasks, str(self.records), *self.items])
        return blake2b(names.encode("utf-8", "replace"), digest_size=8).hexdigest()


def read_records(folder: AnyPath) -> dict[str, Any]:
    """The records in a folder, by name; ValueError for one that is damaged."""
    folder = to_path(folder)
    records = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            records[path.name.removesuffix(".json")] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path} is damaged: remove it, and what it is of is done again.") from None
    return records


__all__ = ["EXECUTORS", "Engine", "Work", "read_records", "run"]
