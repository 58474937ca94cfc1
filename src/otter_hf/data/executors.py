"""The executors of datatrove, which is imported here and nowhere else.

Tasks, marks, logs and statistics are datatrove's. Who hands tasks to workers, here and on Ray, is not: in version
0.10.1 its local and Ray executors wait for ever for the task of a worker that was killed, and the one of Ray ends
without an error when a task has failed.
"""

import json
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.utils.stats import PipelineStats, Stats
from transformers.utils import logging

from ..extras import missing
from ..files import remove
from ..storage import to_path
from .engine import Engine, Work


logger = logging.get_logger(__name__)

_EXECUTORS = {"local": LocalPipelineExecutor, "ray": RayPipelineExecutor, "slurm": SlurmPipelineExecutor}
# a worker that is killed so often, without a task done in between, is killed by its task
_MOST_DEATHS = 3


def execute(work: Work, engine: Engine, finish: Callable[[], Any] | None) -> bool:
    """As `engine.run`, on datatrove."""
    tasks = min(engine.tasks or 4 * engine.workers, len(work.items))
    folder = to_path(engine.logging_dir or work.records.parent / ".engine") / f"{tasks}-{work.digest(tasks)}"
    for place in (folder, work.records):
        if str(place).startswith("memory:"):
            raise ValueError(f"{place} is in the memory of one process: several workers need another place.")
    kind = _EXECUTORS[engine.executor]
    engine.check_options(kind)
    work.stats = Stats(work.name)
    settings = {"tasks": tasks, "workers": engine.workers, **engine.options}
    if kind is SlurmPipelineExecutor:
        _check_slurm(engine)
        # as in this process, whatever a shell on another machine would find
        path = f'export PATH="{os.path.dirname(sys.executable)}:$PATH"'
        settings = {"env_command": path, "job_name": "otter-hf", **settings}
    executor = kind([work], logging_dir=str(folder), **settings)
    _forget_what_is_gone(executor, work)
    if kind is SlurmPipelineExecutor:
        return _submit(executor, settings, finish)
    results = _locally(executor, engine.workers) if engine.executor == "local" else _on_ray(executor, engine.workers)
    with logging.tqdm(desc=work.name, total=tasks, unit=" tasks") as bar:
        bar.update(tasks - len(_incomplete(executor)))
        for _ in results:
            bar.update()
    _merge_statistics(executor, tasks)
    return True


def _forget_what_is_gone(executor: PipelineExecutor, work: Work) -> None:
    """Takes the marks from tasks of which an item has no record (any more)."""
    numbers = {name: number for number, name in enumerate(work.items)}
    ranks = {numbers[name] % executor.world_size for name in work.missing()}
    for rank in ranks.difference(_incomplete(executor)):
        executor.logging_dir.rm(f"completions/{rank:05d}")


def _incomplete(executor: PipelineExecutor) -> list[int]:
    executor.logging_dir.fs.invalidate_cache()  # the marks are of other processes
    return executor.get_incomplete_ranks()


def _run_task(executor: PipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, local_rank=1)  # its logs to the file: the terminal has the bar


# of a worker process, which is handed it once; or why it could not be read
_executor: PipelineExecutor | Exception | None = None


def _receive(pickled: bytes, environment: dict[str, str]) -> None:
    global _executor
    # that of the process they are forked from is of the time when it began
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    try:
        _executor = pickle.loads(pickled)
    except Exception as error:  # with which a worker would end as if it had been killed
        _executor = error


def _run_received(rank: int) -> None:
    if isinstance(_executor, Exception):
        raise _executor
    _run_task(_executor, rank)


def _start_context() -> BaseContext:
    """
    Workers are not forked from this process, where threads are at work whose locks they would inherit, but from one
    that only imports this module, which takes seconds, once for all of them; on Windows each worker imports it.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _locally(executor: PipelineExecutor, workers: int) -> Iterator[int]:
    """Runs the tasks that are not complete; yields their numbers as they are done."""
    deaths, context, pickled = 0, _start_context(), pickle.dumps(executor)
    while ranks := _incomplete(executor):
        processes = {"mp_context": context, "initializer": _receive, "initargs": (pickled, dict(os.environ))}
        with ProcessPoolExecutor(min(workers, len(ranks)), **processes) as pool:
            futures = {pool.submit(_run_received, rank): rank for rank in ranks}
            try:
                for future in as_completed(futures):
                    future.result()
                    deaths = 0
                    yield futures[future]
            except BrokenProcessPool:
                deaths += 1
                if deaths > _MOST_DEATHS:
                    raise RuntimeError(
                        f"Workers were killed {deaths} times, without a task done in between: is there enough memory "
                        f"for {workers}?"
                    ) from None
                logger.warning("A worker was killed: the tasks under way begin again, behind the items that are done.")
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _on_ray(executor: PipelineExecutor, workers: int) -> Iterator[int]:
    """As `_locally`, on the Ray cluster of this machine."""
    try:
        import ray
    except ImportError:
        raise ValueError(missing("--executor ray", "ray")) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    task = ray.remote(
        num_cpus=executor.cpus_per_task,
        num_gpus=executor.gpus_per_task,
        max_retries=_MOST_DEATHS,
        scheduling_strategy="SPREAD",
        **(executor.ray_remote_kwargs or {}),
    )(_run_task)
    reference = ray.put(executor)
    waiting, running = deque(_incomplete(executor)), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                rank = waiting.popleft()
                running[task.remote(reference, rank)] = rank
            (done,), _ = ray.wait(list(running), num_returns=1)
            rank = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"Task {rank} was lost on Ray {_MOST_DEATHS + 1} times: {error}") from error
            yield rank
    finally:
        for one in running:
            ray.cancel(one, force=True)


def _merge_statistics(executor: PipelineExecutor, tasks: int) -> None:
    total = PipelineStats()
    for rank in range(tasks):
        with executor.logging_dir.open(f"stats/{rank:05d}.json") as file:
            total += PipelineStats.from_json(json.load(file))
    with executor.logging_dir.open("stats.json", "wt") as file:
        total.save_to_disk(file)


def _check_slurm(engine: Engine) -> None:
    for option in ("time", "partition"):
        if option not in engine.options:
            raise ValueError(f"Slurm needs the option {option}, as in time=12:00:00 partition=cpu.")


def _submit(executor: SlurmPipelineExecutor, settings: dict[str, Any], finish: Callable[[], Any] | None) -> bool:
    """Hands the tasks, and what comes behind them, to Slurm; see `execute`."""
    if not _incomplete(executor):
        return True
    last = executor
    if finish is not None:
        folder = executor.logging_dir.resolve_paths("finish")
        remove(to_path(folder))
        settings = {**settings, "tasks": 1, "workers": -1}
        last = SlurmPipelineExecutor([_Finish(finish)], logging_dir=folder, depends=executor, **settings)
    try:
        last.run()
    except FileNotFoundError as error:
        raise ValueError(f"Slurm cannot be reached from here: there is no {error.filename}.") from None
    logger.warning(f"Slurm job {executor.job_id}: {executor.tasks} tasks, logs in {executor.logging_dir.path}.")
    return False


class _Finish:
    """What comes behind all tasks, as a step of a pipeline."""

    def __init__(self, finish: Callable[[], Any]):
        self.finish = finish

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        self.finish()

    def __repr__(self) -> str:
        return "finish"
