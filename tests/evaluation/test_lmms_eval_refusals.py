"""What `otter-hf eval` refuses before it asks a model anything."""

from types import SimpleNamespace

import benchmark_rows
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from benchmark_rows import write_parquet

from otter_hf.cli import main
from otter_hf.evaluation import run
from otter_hf.evaluation.benchmarks import COLUMNS


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"name": "mme", "data_path": "./missing.parquet"}, "./missing.parquet, do not exist"),
        ({"name": "mme", "api_key": "sk-secret"}, "OPENAI_API_KEY"),
        ({"name": "mmvet"}, "needs a judge"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(dataset, message, otter_folder, data, tmp_path, capsys, no_key):
    if dataset == {"name": "mmvet"}:
        dataset = {**dataset, "data_path": data("mmvet")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [str(otter_folder)], "datasets": [dataset], "output": str(tmp_path)}))
    assert main(["eval", str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and "sk-secret" not in error


def test_a_filelock_that_lmms_eval_cannot_use_is_named(otter_folder, data, tmp_path, capsys, no_key, monkeypatch):
    """filelock 4 has no `filelock._api`, which lmms-eval 0.7.3 imports when a run starts."""
    find = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "filelock._api" else find(name))
    dataset = {"name": "pope", "data_path": data("pope")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": [str(otter_folder)], "datasets": [dataset], "output": str(tmp_path)}))
    assert main(["eval", str(path)]) == 2
    assert "install 'filelock<4'" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("dataset", ["seedbench", {"name": "imagenet", "train": "a", "test": "b"}])
def test_rankings_of_an_endpoint_are_refused_before_anything_is_asked(dataset, tmp_path, capsys, monkeypatch):
    models = [{"endpoint": "http://127.0.0.1:1/v1", "model": "far"}]
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"models": models, "datasets": ["pope", dataset], "output": str(tmp_path / "out")}))
    assert main(["eval", str(path)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ranks answers by their log-probabilities, which no endpoint gives: take" in told and "'far' out" in told
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_there_is_not(otter_folder, tmp_path, capsys, no_key, monkeypatch):
    """Told before anything is read; lmms-eval would end in a KeyError."""
    known = SimpleNamespace(all_tasks=["mmmu_val"])
    monkeypatch.setattr(run, "_task_manager", lambda is_ours: known)
    for name, hint in (
        ("mmee", "did you mean 'mme'?"),
        ("mmmu_vall", "did you mean 'mmmu_val'?"),
        ("x", "lists ours"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"models": [str(otter_folder)], "datasets": [name], "output": str(tmp_path)}))
        assert main(["eval", str(path)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"There is no benchmark {name!r}, neither here nor in lmms-eval" in error and hint in error


def test_a_missing_column_is_named(otter_folder, data, tmp_path, capsys, no_key, monkeypatch):
    """Before any model is asked about the data in front of it."""
    monkeypatch.setattr(run, "build_model", lambda *arguments: pytest.fail("no model is needed"))
    rows = [{key: value for key, value in row.items() if key != "category"} for row in benchmark_rows.mmbench()]
    rows = [{key: value for key, value in row.items() if key != "question"} for row in rows]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    datasets = [{"name": "pope", "data_path": data("pope")}, {"name": "mmbench", "data_path": str(path)}]
    config = {"models": [str(otter_folder)], "datasets": datasets, "output": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["eval", str(tmp_path / "config.yaml")]) == 2
    assert "'question'" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", sorted(COLUMNS))
def test_a_column_that_is_not_there_is_told_before_anything_is_asked(benchmark, tmp_path):
    """Each that a benchmark needs, such as MME's `question_id`, by which its pairs of questions are found."""
    path, dataset = str(tmp_path / "rows.parquet"), SimpleNamespace(name=benchmark, data_path="rows.parquet")
    needed = [column.split(" or ")[-1] for column in COLUMNS[benchmark]]
    for left_out in dict.fromkeys(needed):
        pq.write_table(pa.table({column: ["x"] for column in needed if column != left_out}), path)
        with pytest.raises(ValueError, match=f"has the columns .*, and no .*{left_out}'") as refused:
            run._check_columns(dataset, path, {"test_split": "train"})
        assert str(refused.value).count("\n") == 0
    pq.write_table(pa.table({column: ["x"] for column in needed}), path)
    run._check_columns(dataset, path, {"test_split": "train"})
