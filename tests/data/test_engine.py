"""Many items in many tasks: each done once, whatever is killed, and the same bytes from any executor."""

import json
import os
import stat
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from engine_steps import Mark, TellEnvironment, write_documents
from packaging.requirements import Requirement
from pretraining_shards import padded, picture
from transformers import BertConfig, BertModel

from otter_hf.cli import engine_options, main
from otter_hf.data import neighbours, to_parquet
from otter_hf.data.engine import EXECUTORS, Engine, Work, read_records, run
from otter_hf.data.formats import write_mimicit
from otter_hf.data.images import encode_base64
from otter_hf.data.pretraining import PretrainingSet, PretrainingStream, read_pretraining_sets
from otter_hf.data.pretraining.converters import mmc4_to_tar
from otter_hf.storage import to_path


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def files(folder) -> dict[str, bytes]:
    """What is in a folder, but for the books of the engine."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".engine"}


def conversion(folder, files: int) -> list[str]:
    """A command on so many files of a document each."""
    docs, images = write_documents(folder / "in", files=files, documents=1)
    inputs = ["--doc-shards", docs, "--image-shards", images]
    return ["data", "mmc4-to-tar", *inputs, "--output", str(folder / "out")]


def times_worked(folder, item) -> int:
    return len(list(Path(folder).glob(f"{item}.*")))


def test_a_worker_that_cannot_read_its_work_says_why(monkeypatch):
    """It would end while it is started, as one does that was killed."""
    executors = pytest.importorskip("otter_hf.data.executors")
    monkeypatch.setattr(executors, "_executor", None)
    executors._receive(b"cno.such.module\nstep\n.", dict(os.environ))
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        executors._run_received(0)


@pytest.mark.parametrize("threads", [1, 3])
def test_one_worker_needs_no_engine(tmp_path, threads):
    items = {name: name for name in ("a", "bb", "ccc")}
    (tmp_path / "seen").mkdir()
    with pytest.raises(ValueError, match="item bb cannot be used"):
        run(Mark(tmp_path / "seen", fail="bb"), items, tmp_path / "records", Engine(threads=threads), name="marks")
    before = read_records(tmp_path / "records")
    assert "bb" not in before and before["a"] == {"length": 1}
    assert run(Mark(tmp_path / "seen"), items, tmp_path / "records", Engine(threads=threads), name="marks")
    assert read_records(tmp_path / "records") == {name: {"length": len(name)} for name in items}
    record = tmp_path / "records" / "a.json"
    record.write_text("")
    with pytest.raises(ValueError, match=r"a\.json is damaged: remove it, and what it is of is done again"):
        read_records(tmp_path / "records")
    assert times_worked(tmp_path / "seen", "a") == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"executor": "spark"}, "executor must be one of local, slurm, ray, got 'spark'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"options": {"time": "1:00"}}, "The options time are of an executor"),
        ({"tasks": 3}, "tasks=3 divides the work among workers, and one worker here does all of it"),
    ],
)
def test_engines_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(**settings)


def test_the_command_offers_the_executors_there_are():
    """They stand there a second time: its help loads nothing."""
    assert engine_options.EXECUTORS == EXECUTORS


@pytest.mark.parametrize(
    "given, threads",
    [
        ([], 8),
        (["--workers", "3"], 2),
        (["--workers", "20"], 1),
        (["--workers", "3", "--threads", "5"], 5),
        (["--executor", "ray", "--workers", "3"], 1),
        (["--executor", "slurm", "--executor-options", "cpus_per_task=4", "time=1:00"], 4),
    ],
)
def test_workers_share_the_threads(given, threads):
    parser = ArgumentParser()
    engine_options.add_engine_options(parser, threads=8)
    assert engine_options.engine_of(parser.parse_args(given)).threads == threads


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    """Without datatrove one worker works, and more of them end in the line that installs it."""
    monkeypatch.setattr("otter_hf.extras.requirements", lambda extra: [Requirement("datatrove>=0.10.1")])
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    monkeypatch.delitem(sys.modules, "otter_hf.data.executors", raising=False)
    command = conversion(tmp_path, files=2)
    assert main([*command, "--workers", "2"]) == 2
    assert "needs datatrove" in capsys.readouterr().err
    assert main([*command, "--executor-options", "time"]) == 2
    assert "are written NAME=VALUE" in capsys.readouterr().err
    assert main(command) == 0


@pytest.fixture
def datatrove():
    return pytest.importorskip("datatrove", reason="datatrove is not installed: the extra scale")


def test_options_of_executors(tmp_path, datatrove):
    for engine, message in (
        (Engine("ray", options={"cpu_per_task": 2}), "'cpu_per_task' is no option .*; did you mean 'cpus_per_task'"),
        (Engine("slurm", options={"partition": "cpu"}), "Slurm needs the option time"),
        (Engine("slurm", options={"time": "1:00:00", "partition": "cpu"}), "there is no sbatch"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Mark(tmp_path), {"a": "a"}, tmp_path / "records", engine, name="marks")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_addresses(tmp_path, scheme, tiny_processor):
    """Documents, pictures and shards at addresses: the bytes of local files, and a stream from there."""
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    import fsspec

    docs, images = write_documents(tmp_path / "in", files=2, documents=3)
    root = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path}/there"
    system, place = fsspec.url_to_fs(root)
    system.makedirs(f"{place}/in", exist_ok=True)
    system.put(f"{tmp_path}/in/", f"{place}/in/", recursive=True)
    there = [pattern.replace(str(tmp_path), root) for pattern in (docs, images)]
    assert mmc4_to_tar(docs, images, tmp_path / "out", max_samples=2).samples == 6
    assert mmc4_to_tar(*there, f"{root}/out", max_samples=2).samples == 6
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert sorted(Path(name).name for name in system.glob(f"{place}/out/*.tar")) == names and len(names) == 4
    for name in [*names, "sizes.json"]:
        assert system.cat_file(f"{place}/out/{name}") == (tmp_path / "out" / name).read_bytes()
    # complete, and known to be so
    assert mmc4_to_tar(*(one.replace("{0..1}", "*") for one in there), f"{root}/out", max_samples=2).samples == 0
    batches = []
    for folder in (tmp_path / "out", f"{root}/out", f"{root}/out/*.tar", f"{root}/out/docs_{{0,1}}.{{000..001}}.tar"):
        settings = {"kind": "interleaved", "shards": str(folder), "batch_size": 3, "keep_single": 1}
        stream = PretrainingStream(read_pretraining_sets(json.dumps({"mmc4": settings})), tiny_processor)
        batches.append([batch["mmc4"]["sample_ids"] for batch in stream.track(stream.dataloader())])
    assert batches[0] == batches[1] == batches[2] == batches[3] and len(batches[0]) == 2
    with pytest.raises(ValueError, match=f"{root}/gone.tar does not exist"):
        read_pretraining_sets(json.dumps({"mmc4": {"kind": "interleaved", "shards": f"{root}/gone.tar"}}))


def test_what_other_processes_write_is_seen(tmp_path, datatrove):
    """Where fsspec remembers what it has listed; and what no other process could see is refused."""
    work = Work(None, {"a": 1, "b": 2}, to_path(f"remembers://{tmp_path}/records"), 1, "work")
    (tmp_path / "records").mkdir()
    for name, missing in (("a", ["b"]), ("b", [])):
        (tmp_path / "records" / f"{name}.json").write_text("{}")
        assert work.missing() == missing
    with pytest.raises(ValueError, match="memory://x/.engine/.* is in the memory of one process"):
        run(Mark(tmp_path), {"a": "a", "b": "b"}, "memory://x/records", Engine(workers=2), name="marks")


def test_an_address_without_its_package(monkeypatch):
    monkeypatch.setattr("otter_hf.extras.requirements", lambda extra: [Requirement("universal-pathlib")])
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ValueError, match="the address s3://bucket/x.tar needs universal-pathlib"):
        PretrainingSet("cc3m", "pairs", "s3://bucket/x.tar")


STAND_IN = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
folder = Path({folder!r})
number = len(list(folder.glob("*.sbatch"))) + 1
script = Path(sys.argv[-1]).read_text()
(folder / f"{{number}}.sbatch").write_text(" ".join(sys.argv[1:-1]) + "\\n" + script)
first, last = re.search(r"#SBATCH --array=(\\d+)-(\\d+)", script).groups()
offset = re.search(r"RUN_OFFSET=(\\d+)", " ".join(sys.argv))
for task in range(int(first), int(last) + 1) if {runs} and "launch_pickled_pipeline" in script else ():
    own = {{"SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": offset.group(1), "SLURM_NODELIST": "n"}}
    result = subprocess.run(["bash", "-c", script], env={{**os.environ, **own}}, capture_output=True, text=True)
    (folder / f"{{number}}.{{task}}.out").write_text(result.stdout + result.stderr)
print(f"Submitted batch job {{number}}")
"""


def slurm(folder, monkeypatch, runs: bool) -> Path:
    """Stands in for Slurm: its `sbatch` keeps what it is handed, and runs the tasks of the array one by one."""
    folder.mkdir()
    launch = f'#!/bin/bash\nexec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"\n'
    programs = {
        "sbatch": STAND_IN.format(python=sys.executable, folder=str(folder), runs=runs),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [ "$1" == -n ] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho n\n",
        # datatrove's, which only a whole environment has beside its Python
        "launch_pickled_pipeline": launch,
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_what_slurm_is_handed(tmp_path, monkeypatch, capsys, datatrove):
    """The text of the jobs; Slurm itself is not here."""
    folder = slurm(tmp_path / "slurm", monkeypatch, runs=False)
    command = conversion(tmp_path, files=5) + ["--executor", "slurm", "--tasks", "3", "--workers", "2"]
    assert main([*command, "--executor-options", "time=1:00:00", "partition=cpu", "mem_per_cpu_gb=4"]) == 0
    assert "handed to Slurm" in capsys.readouterr().out
    jobs = [(folder / f"{number}.sbatch").read_text() for number in (1, 2, 3)]
    assert not (folder / "5.sbatch").exists()
    for line in ("--array=0-2%2", "--time=1:00:00", "--partition=cpu", "--mem-per-cpu=4G", "--requeue"):
        assert f"#SBATCH {line}\n" in jobs[0]
    assert f'export PATH="{Path(sys.executable).parent}:$PATH"' in jobs[0]
    assert "launch_pickled_pipeline" in jobs[0] and "executor.pik" in jobs[0]
    assert "merge_stats" in jobs[1]
    # what comes behind all tasks waits for them
    assert "--dependency=afterok:1" in jobs[2] and "#SBATCH --array=0-0\n" in jobs[2] and "/finish/" in jobs[2]


@pytest.mark.slow
def test_slurm_writes_what_one_process_does(tmp_path, monkeypatch, datatrove):
    """The jobs that Slurm is handed, run one after the other by a stand-in of the same signature."""
    slurm(tmp_path / "slurm", monkeypatch, runs=True)
    patterns = write_documents(tmp_path / "in", files=5, documents=3)
    engine = Engine("slurm", tasks=3, options={"time": "1:00:00", "partition": "cpu"})
    assert mmc4_to_tar(*patterns, tmp_path / "out", engine=engine) is None
    told = "\n".join(path.read_text() for path in (tmp_path / "slurm").glob("*.out"))
    mmc4_to_tar(*patterns, tmp_path / "one")
    assert files(tmp_path / "out") == files(tmp_path / "one"), told
    assert mmc4_to_tar(*patterns, tmp_path / "out", engine=engine).samples == 0


@pytest.mark.slow
def test_tasks_here(tmp_path, datatrove):
    """Bytes do not depend on tasks and workers; a worker killed in the middle; a task that fails; engine's books."""
    patterns = write_documents(tmp_path / "in", files=7, documents=3)
    one = mmc4_to_tar(*patterns, tmp_path / "one", max_samples=2)
    logs = tmp_path / "logs"
    engine = Engine(tasks=3, workers=2, logging_dir=logs)
    assert mmc4_to_tar(*patterns, tmp_path / "two", max_samples=2, engine=engine) == one
    assert files(tmp_path / "one") == files(tmp_path / "two")
    (book,) = logs.iterdir()
    assert sorted(path.name for path in (book / "completions").iterdir()) == ["00000", "00001", "00002"]
    (statistics,) = json.loads((book / "stats.json").read_text())
    assert statistics["stats"]["items"]["total"] == 7 and statistics["stats"]["samples"]["total"] == 21

    items, seen = {str(number): str(number) for number in range(12)}, tmp_path / "seen"
    seen.mkdir()
    engine = Engine(tasks=4, workers=2)
    assert run(Mark(seen, kill="5"), items, tmp_path / "records", engine, name="marks")
    assert sorted(read_records(tmp_path / "records")) == sorted(items) and times_worked(seen, "5") == 2
    # one behind the other in their task: what is done is not done again
    assert times_worked(seen, "1") == 1
    with pytest.raises(ValueError, match="^item 7 cannot be used$"):
        run(Mark(seen, fail="7"), items, tmp_path / "failed", engine, name="marks")
    (tmp_path / "failed" / "3.json").unlink(missing_ok=True)  # of a task that may be marked as complete
    for records in (tmp_path / "failed", f"remembers://{tmp_path}/failed"):
        assert run(Mark(seen), items, records, engine, name="marks")
        assert sorted(read_records(records)) == sorted(items)
        (tmp_path / "failed" / "4.json").unlink()


@pytest.mark.slow
def test_workers_have_the_environment_of_now(tmp_path, monkeypatch, datatrove):
    """Though they are forked from a process that began earlier."""
    for value in ("before", "now"):
        monkeypatch.setenv("OTTER_HF_TEST", value)
        items = {name: name for name in ("OTTER_HF_TEST", "OTTER_HF_NONE")}
        assert run(TellEnvironment(), items, tmp_path / value, Engine(workers=2), name="environment")
        assert read_records(tmp_path / value)["OTTER_HF_TEST"] == {"value": value}


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_store_to_parquet_in_tasks(tmp_path, monkeypatch, datatrove, executor):
    """In parts, of which one holds no picture: the bytes of one process."""
    slurm(tmp_path / "slurm", monkeypatch, runs=True)
    monkeypatch.setattr(to_parquet, "PART_BYTES", 20_000)
    data = {f"I{i}": padded(picture(i), 1000) if i not in range(20, 40) else b"none" for i in range(100)}
    (tmp_path / "X.json").write_text(json.dumps({id: encode_base64(one) for id, one in data.items()}))
    options = {"time": "1:00:00", "partition": "cpu"} if executor == "slurm" else {}
    settings = {"resize": 8, "cache_dir": tmp_path / "cache"}
    for encoding in ("bytes", "base64"):
        one, two = (tmp_path / f"{name}.{encoding}.parquet" for name in ("one", "two"))
        expected = to_parquet.store_to_parquet(tmp_path / "X.json", one, encoding=encoding, **settings)
        assert expected == (80, [f"I{i}" for i in range(20, 40)])
        settings["engine"] = Engine(executor, tasks=3, workers=2, options=options)
        done = to_parquet.store_to_parquet(tmp_path / "X.json", two, encoding=encoding, **settings)
        if executor == "slurm":
            assert done is None and two.exists()
            done = to_parquet.store_to_parquet(tmp_path / "X.json", two, encoding=encoding, **settings)
        del settings["engine"]
        assert done == expected
        assert (files(one) == files(two) and len(files(two)) > 2) if encoding == "bytes" else same(one, two)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_neighbours_in_tasks(tmp_path, datatrove, monkeypatch, tiny_processor):
    """Other processes embed what one would have."""
    monkeypatch.setattr(neighbours, "ITEM_RECORDS", 3)
    records = {f"r{i}": {"instruction": f"{i % 7} of {i}", "answer": "A"} for i in range(20)}
    files = write_mimicit(tmp_path, "X", records)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_processor.tokenizer.save_pretrained(tmp_path / "encoder")
    written = [
        neighbours.write_neighbours(files.instructions_path, tmp_path / name, tmp_path / "encoder", k=3, engine=engine)
        for name, engine in (("one", None), ("two", Engine(tasks=4, workers=2)))
    ]
    assert all(same(*paths) for paths in zip(*written, strict=True))


def same(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()
