"""Every model on every benchmark, by lmms-eval."""

import gc
import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from PIL import ImageFile
from transformers.utils import logging

from ..data.controls import CONTROLS
from ..errors import did_you_mean
from ..extras import pip_install, requirements
from ..files import claim, disk_full_told, replacing, write_json, write_text
from ..made_from import state
from .benchmarks import BENCHMARKS, COLUMNS, Options, results_function, with_paths
from .config import FEWSHOT, RANKED, TASKS, DatasetSpec, EvalConfig, ModelSpec, file_name
from .data_sources import READERS, data_source, picture_places, read_split
from .judge import Judge
from .published import read_published, write_table
from .replies import ReplyLog
from .report import table, write_samples
from .scoring import mmbench
from .scoring.replies import count_fates, fate


logger = logging.get_logger(__name__)

TASK_FOLDER = Path(__file__).parent / "tasks"
# of what is drawn, as lmms-eval has it for its tasks
_SEED = 1234
# tasks without a score when nobody judges
_NEEDS_JUDGE = ("otter_magnifierbench_freeform", "otter_mmvet")


@contextmanager
def _pillow_as_lmms_eval_sets_it():
    """
    Importing lmms-eval makes Pillow fill up truncated pictures with grey, for all of the program and for good: some of
    its data sets hold them. It is so while we evaluate, and afterwards as it was.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def _task_manager(is_ours: bool):
    """lmms-eval's view of our tasks, or of all, which takes it a while."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=[str(TASK_FOLDER)], include_defaults=not is_ours)


@_pillow_as_lmms_eval_sets_it()
def evaluate(config: EvalConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Evaluates, and writes under `config.output`: `results.json`, `report.txt`, and for each model a folder with the
    samples and the replies of its runs; with `config.training_data` first `contamination.json`, which rows are in the
    training data, too. Started again after a kill it goes on with the replies that are there.

    Returns:
        model -> dataset -> figure -> value, on the main process; what is known so far on others.

    Raises:
        ValueError: for data, models or settings that do not fit, before anything is asked where possible.
        OSError: if another process evaluates into the same folder, or the disk is full.
    """
    _require_lmms_eval()
    # without an accelerator, processes of torchrun meet on the CPU; accelerate would take each for the only one
    state = PartialState(cpu=not torch.accelerator.is_available())
    for spec in config.models:
        _check_key(spec)
    for dataset in config.datasets:
        _check_dataset(dataset, config.models)
    # the others share the folder with the first one
    claimed = claim(config.output / ".lock", config.output) if state.is_main_process else nullcontext()
    with claimed, disk_full_told(config.output):
        return _evaluate(config)


def _evaluate(config: EvalConfig) -> dict[str, dict[str, dict[str, Any]]]:
    for dataset in config.datasets:
        if dataset.data_path:  # looked at now, not when those before it have been asked
            _task_config(dataset.tasks[0], dataset, config.output / "data")
    if config.training_data is not None and PartialState().is_main_process:
        _look_for_contamination(config)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for spec in config.models:
        folder = config.output / file_name(spec.name)
        lm = build_model(spec, folder / "replies")
        results[spec.name] = {}
        for dataset in config.datasets:
            if dataset.fewshot is not None:
                from .fewshot.run import run_fewshot

                torch.manual_seed(_SEED)
                figures = run_fewshot(lm, dataset, folder, config.controls)
            else:
                figures = run_benchmark(lm, dataset, folder, config)
            results[spec.name][dataset.name] = figures
            if lm.rank == 0:
                write_json(config.output / "results.json", results, indent=2)
                write_text(config.output / "report.txt", table(results))
        del lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def _look_for_contamination(config: EvalConfig) -> None:
    """Writes `contamination.json`, unless it is there and was made from the same."""
    from .contamination import check_contamination, inputs_of

    path, now = config.output / "contamination.json", inputs_of(config)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if not now.changes(before):
        logger.warning(f"training_data {config.training_data}: as before, see {path}")
        return
    overlap = check_contamination(config)
    write_json(path, {**overlap.to_dict(), "made_from": now.to_json()}, indent=2)
    logger.warning(f"training_data {config.training_data}: {overlap.table()}")


def build_model(spec: ModelSpec, replies: Path):
    """lmms-eval's model for `spec`, which keeps its replies in a folder."""
    from .lmms import Endpoint, TransformersModel

    if spec.path is not None:
        return TransformersModel(spec.path, batch_size=spec.batch_size, replies=replies, **spec.options)
    _check_key(spec)
    # the address otherwise comes from the environment, too
    address = {"base_url": spec.endpoint} if spec.endpoint else {}
    address |= spec.options
    return Endpoint(model=spec.model, batch_size=spec.batch_size, timeout=120, replies=replies, **address)


def _check_key(spec: ModelSpec) -> None:
    if spec.path is None and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(
            f"The endpoint of {spec.name!r} needs a key: set OPENAI_API_KEY in the environment (any word for a local "
            "server)."
        )


def run_benchmark(lm, dataset: DatasetSpec, folder: Path, config: EvalConfig) -> dict[str, Any]:
    """
    The figures of one model on one benchmark, with `controls` among them if the configuration says so; writes the
    samples, and MMBench's table for the server.
    """
    options, tasks = _options(lm, dataset, folder, config)
    ours = all(task in BENCHMARKS for task in tasks)
    if config.controls and not ours:
        logger.warning(
            f"{dataset.name} is a task of lmms-eval, which is asked without controls: they need its scores."
        )
    records: dict[str | None, dict[str, list]] = {}
    figures: dict[str, Any] = {}
    for control in (None, *CONTROLS) if config.controls and ours else (None,):
        lm.control = control
        try:
            output = _simple_evaluate(lm, dataset, tasks, options, folder, config)
        finally:
            lm.control = None
        if output is None:  # not the main process
            continue
        records[control] = {}
        for task, samples in output["samples"].items():
            samples = sorted(samples, key=lambda sample: sample["doc_id"])
            of_task = [sample[BENCHMARKS[task].metrics[0]] for sample in samples] if ours else [{} for _ in samples]
            records[control][task] = of_task
            logged = [_logged(sample, record) for sample, record in zip(samples, of_task, strict=True)]
            name = task if control is None else f"{task}.{control}"
            write_samples(folder / f"{name}.samples.jsonl", logged)
            if control is not None:
                continue
            if ours:
                figures |= BENCHMARKS[task].score(of_task)
            else:
                figures |= {name: value for name, value in output["results"][task].items() if _is_figure(name, value)}
            if task == "otter_mmbench":
                _write_submission(folder / "mmbench_submission.xlsx", of_task)
            replies = (reply for sample in samples for reply in sample["filtered_resps"])
            for fate_name, count in count_fates(replies).items():
                figures[fate_name] = figures.get(fate_name, 0) + count
    if len(records) > 1:
        figures["controls"] = {}
        for task, shown in records[None].items():
            figures["controls"] |= BENCHMARKS[task].gains(shown, *(records[control][task] for control in CONTROLS))
    return figures


def _simple_evaluate(lm, dataset: DatasetSpec, tasks: list[str], options: Options, folder: Path, config: EvalConfig):
    """What lmms-eval makes of a benchmark: its results and samples, on the main process only."""
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    ours = all(task in BENCHMARKS for task in tasks)
    built = [_build_task(task, dataset, options, config.output / "data") for task in tasks] if ours else list(tasks)
    try:
        return simple_evaluate(
            model=lm,
            tasks=built,
            task_manager=_task_manager(ours),
            limit=dataset.limit,
            bootstrap_iters=0,
            log_samples=True,
            cli_args=Namespace(process_with_media=not ours, output_path=str(folder)),
        )
    except RetryError as error:  # lmms-eval tries five times whatever went wrong
        raise error.last_attempt.exception() from None


def _options(lm, dataset: DatasetSpec, folder: Path, config: EvalConfig) -> tuple[Options, list[str]]:
    """How replies are read, and the tasks that can be scored: without a judge, MagnifierBench has no free form."""
    if not os.environ.get("OPENAI_API_KEY"):
        left = [task for task in dataset.tasks if task not in _NEEDS_JUDGE]
        if len(left) < len(dataset.tasks):
            logger.warning(f"{dataset.name}: no OPENAI_API_KEY, hence no judge; what needs one is left out.")
        return Options(**dataset.options), left
    log = ReplyLog(folder / "judge", lm.rank)
    judge = None
    if dataset.tasks[0] in BENCHMARKS:
        judge = Judge(dataset.judge, log, max_retries=config.judge_retries, options=config.judge_options)
    return Options(judge=judge, **dataset.options), list(dataset.tasks)


def build_tasks(dataset: DatasetSpec, tables: Path) -> Iterator[tuple[str, Any]]:
    """
    Name and task of lmms-eval of a data set, for who reads its rows only: of two on the same rows the first.

    Args:
        tables: folder for the tables that benchmarks' own files become.
    """
    if all(task in BENCHMARKS for task in dataset.tasks):
        yield dataset.tasks[0], _build_task(dataset.tasks[0], dataset, Options(), tables)
        return
    from lmms_eval.tasks import get_task_dict

    found = [*get_task_dict([*dataset.tasks], _task_manager(False)).items()]
    while found:
        name, task = found.pop(0)
        if isinstance(task, Mapping):  # a group
            found[:0] = task.items()
        else:
            yield str(name), task


def _task_config(name: str, dataset: DatasetSpec, tables: Path) -> dict[str, Any]:
    """What lmms-eval is told of one of our tasks; ValueError for local data that lack a column."""
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(str(TASK_FOLDER / f"{name}.yaml"), mode="full")
    if dataset.prompts:
        config["lmms_eval_specific_kwargs"] = {"default": dict(dataset.prompts)}
    if dataset.split:
        config["test_split"] = dataset.split
    if dataset.data_path:
        config.pop("dataset_name", None)
        path = _in_our_columns(dataset, config["test_split"], tables)
        config |= data_source(path, config["test_split"])
        _check_columns(dataset, path, config)
        read, place = config["doc_to_visual"], picture_places(dataset.data_path, dataset.image_dir)
        config["doc_to_visual"] = lambda row: read(with_paths(row, place))
    return config


def _build_task(name: str, dataset: DatasetSpec, options: Options, tables: Path):
    from lmms_eval.api.task import ConfigurableMessagesTask
    from tenacity import RetryError

    config = _task_config(name, dataset, tables)
    config["process_results"] = results_function(BENCHMARKS[name], options)
    task_class = config.pop("class", ConfigurableMessagesTask)
    try:
        return task_class(config=config)
    except RetryError as error:  # lmms-eval tries again what cannot work
        raise ValueError(f"The data of {dataset.name!r} cannot be read: {error.last_attempt.exception()}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"The data of {dataset.name!r} lack a column or split: {error!r}.") from error


def _in_our_columns(dataset: DatasetSpec, split: str, tables: Path) -> str:
    """The path of the data; of a benchmark's own file, that of a table made from it."""
    source = Path(dataset.data_path).expanduser()
    if not source.exists():
        return dataset.data_path
    made_of = [str(source.resolve()), state(source), split, dataset.image_dir]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    table = tables / f"{dataset.name}-{key}.parquet"
    tables.mkdir(parents=True, exist_ok=True)
    # one process writes, the others find it, however long that takes
    with FileLock(table.with_name(f".{table.name}.lock")):
        if not table.is_file():
            rows = read_published(dataset.name, source, split, dataset.image_dir)
            if rows is None:
                return dataset.data_path
            write_table(table, rows)
    return str(table)


def _check_columns(dataset: DatasetSpec, path: str, config: Mapping) -> None:
    """A file that lacks a column is known by those it has, before lmms-eval tries it five times."""
    if not Path(path).expanduser().is_file():
        return
    there = read_split(path, config["test_split"]).column_names
    for column in COLUMNS[dataset.name]:
        if not set(column.split(" or ")) & set(there):
            needed = ", ".join(COLUMNS[dataset.name])
            raise ValueError(
                f"{dataset.data_path} has the columns {', '.join(there[:12])}, and no {column!r}: {dataset.name} "
                f"needs {needed}, or the file as its authors publish it (docs/evaluation.md)."
            )


def _check_dataset(dataset: DatasetSpec, models: Sequence[ModelSpec]) -> None:
    for model in models:
        if model.path is None and dataset.name in RANKED:
            raise ValueError(
                f"{dataset.name} ranks answers by their log-probabilities, which no endpoint gives: "
                f"take {dataset.name} or {model.name!r} out."
            )
    if dataset.tasks and set(dataset.tasks) <= set(_NEEDS_JUDGE) and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"The dataset {dataset.name!r} needs a judge: set OPENAI_API_KEY in the environment.")
    if any(task not in BENCHMARKS for task in dataset.tasks):
        known = _task_manager(False).all_tasks
        for task in dataset.tasks:
            if task not in known:
                hint = did_you_mean(task, [*TASKS, *FEWSHOT, *known], "docs/evaluation.md lists ours.")
                raise ValueError(f"There is no benchmark {task!r}, neither here nor in lmms-eval; {hint}")
    paths = [dataset.data_path]
    if dataset.fewshot is not None:
        sources = [dataset.fewshot["train"], dataset.fewshot["test"]]
        paths = [path for source in sources for path in (source.values() if isinstance(source, Mapping) else [source])]
    for path in filter(None, map(str, paths)):
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in READERS
        if looks_local and not Path(path).expanduser().exists():
            raise ValueError(f"The data of {dataset.name!r}, {path}, do not exist.")


def _logged(sample: Mapping, record: Mapping) -> dict[str, Any]:
    """A line of the sample log; `fate` says why a reply is no answer."""
    prompt = sample["arguments"][0] if sample["arguments"] else None
    replies = sample["filtered_resps"]
    fates = [fate(reply) for reply in replies if isinstance(reply, str)]
    told = {"fate": fates[0]} if fates and fates[0] != "answered" else {}
    return {"row": sample["doc_id"], "prompt": prompt, "replies": replies, **told, **record}


def _is_figure(name: str, value) -> bool:
    return "stderr" not in name and isinstance(value, (int, float))


def _write_submission(path: Path, records: list[Mapping]) -> None:
    import pandas as pd

    with replacing(path) as written, written.open("wb") as file:
        pd.DataFrame(mmbench.submission_rows(records)).to_excel(file, index=False)


def _require_lmms_eval() -> None:
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        wanted = map(str, requirements("eval"))
        raise ValueError(
            f"otter-hf eval needs lmms-eval ({error}): {pip_install(*wanted)} && "
            f"{pip_install('--no-deps', 'lmms-eval==0.7.3')}"
        ) from error
    # lmms-eval 0.7.3 imports it when a run starts, and would end in a traceback
    if find_spec("filelock._api") is None:
        raise ValueError(
            f"lmms-eval 0.7.3 does not work with filelock {version('filelock')}, but with 3.32.7: "
            f"{pip_install('filelock<4')}"
        )
