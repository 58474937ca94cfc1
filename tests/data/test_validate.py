import io
import json

import pandas as pd
import pytest
from PIL import Image

from otter_hf.cli import main
from otter_hf.data.engine import Engine
from otter_hf.data.formats import write_mimicit
from otter_hf.data.images import encode_base64, image_bytes
from otter_hf.data.mixture import MimicitMixture, MixtureEntry
from otter_hf.data.stream import StreamedMixture
from otter_hf.data.validate import check_mixture
from otter_hf.training.fields import DataArguments


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


RECORDS = {
    "r1": {"instruction": "Colour?", "answer": "red", "image_ids": ["red"], "rel_ins_ids": []},
    "r2": {"instruction": "Sure?", "answer": "yes", "image_ids": ["red"], "rel_ins_ids": ["r1"]},
    "b": {"instruction": "Sky?", "answer": "blue", "image_ids": ["blue"], "rel_ins_ids": []},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def dataset(tmp_path, by_colour):
    """Paths of the parts of a good dataset, to be spoilt."""
    encoded = {id: encode_base64(image_bytes(by_colour[id])) for id in ("red", "blue")}
    write(tmp_path / "X_instructions.json", {"data": RECORDS})
    write(tmp_path / "X.json", encoded)
    write(tmp_path / "X_train.json", {"r2": ["r1"], "b": []})
    return encoded


def mixture(tmp_path, group="IMAGE_TEXT", **settings):
    paths = {"mimicit_path": "X_instructions.json", "images_path": "X.json", "train_config_path": "X_train.json"}
    return write(tmp_path / "mix.yaml", {group: {"X": {**paths, **settings}}})


def rules(report, severity=None):
    return {finding.rule: finding for finding in report.findings if severity in (None, finding.severity)}


def test_good_data_has_no_findings(tmp_path, dataset):
    report = check_mixture(mixture(tmp_path))
    assert report.ok(strict=True) and not report.findings
    (counts,) = report.datasets
    assert (counts.records, counts.examples, counts.images, counts.unmatched_image_ids) == (3, 2, 2, 0)
    assert "0 errors, 0 warnings, 0 notes" in report.table()


@pytest.mark.parametrize("group", ["IMAGE_TEXT", "TEXT_ONLY"])
@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_texts_that_speak_of_a_picture_which_is_not_shown(tmp_path, dataset, group, mark):
    images = {"images_path": None} if group == "TEXT_ONLY" else {}
    records = {"r1": {**RECORDS["r1"], "instruction": f"{mark} colour?", "image_ids": []}, "r2": RECORDS["r2"]}
    write(tmp_path / "X_instructions.json", {"data": records})
    write(tmp_path / "X_train.json", {"r2": [], "r1": []})
    found = rules(check_mixture(mixture(tmp_path, group, **images)), "warning")
    assert found["placeholder without picture"].ids == ["r1"]


def test_earlier_turns_that_are_not_trained(tmp_path, dataset):
    report = check_mixture(mixture(tmp_path, train_config_path=None))
    assert "give train_config_path" in rules(report, "warning")["unused rel_ins_ids"].message
    report = check_mixture(mixture(tmp_path, train_config_path=None), populate_rel_ins=True)
    assert "unused rel_ins_ids" not in rules(report)


def test_over_long_examples(tmp_path, dataset, tiny_processor):
    # one token per byte; with its context the example r2 has 7 + 3 + 5 + 3, and 12 around each
    for max_length, ids in ((42, None), (41, ["r2"])):
        report = check_mixture(mixture(tmp_path), tokenizer=tiny_processor.tokenizer, max_length=max_length)
        found = rules(report, "warning").get("over-long")
        assert (found and found.ids) == ids
    with pytest.raises(ValueError, match="max_length=5 needs a tokenizer"):
        check_mixture(mixture(tmp_path), max_length=5)


def test_an_over_long_answer_is_seen_without_a_tokenizer(tmp_path, dataset):
    records = {"r1": {**RECORDS["r1"], "answer": "so " * 3000}, "r2": RECORDS["r2"]}
    write(tmp_path / "X_instructions.json", {"data": records})
    found = rules(check_mixture(mixture(tmp_path)), "warning")["over-long"]
    assert "words, and training keeps 2048 tokens unless max_length says otherwise" in found.message
    assert DataArguments.max_length == 2048


def test_turned_and_deep_pictures_are_noted(tmp_path, dataset):
    def encoded(picture, **options):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        return encode_base64(buffer.getvalue())

    exif = Image.Exif()
    exif[0x0112] = 6
    turned, deep = encoded(Image.new("RGB", (8, 4)), exif=exif), encoded(Image.new("I;16", (8, 4)))
    write(tmp_path / "X.json", {"red": turned, "blue": deep})
    report = check_mixture(mixture(tmp_path))
    assert report.ok(strict=True)
    assert rules(report, "note")["turned or deep image"].ids == ["red", "blue"]
    write(tmp_path / "X.json", {"red": turned, "blue": encoded(Image.new("I;16", (8, 4), 4000))})
    report = check_mixture(mixture(tmp_path))
    assert rules(report, "warning")["dark image"].ids == ["blue"] and not report.ok(strict=True)


def changed(**change):
    return {"data": {**RECORDS, "r2": {**RECORDS["r2"], **change}}}


@pytest.mark.parametrize(
    "content, rule, severity",
    [
        (changed(answer=None), "missing answer", "error"),
        (changed(instruction=3), "missing instruction", "error"),
        (changed(answer="  "), "empty answer", "warning"),
        (changed(instruction="<image>?"), "reserved token", "note"),
        (changed(instruction="<image> or <image>?", images_in_text=True), "images in text", "error"),
        (changed(images_in_text="yes"), "images in text", "error"),
        (changed(image_ids=["red", "blue"], frames_per_medium=[3]), "frames per medium", "error"),
        (changed(image_ids=["red", "gone"]), "missing image", "error"),
        (changed(image_ids=[1]), "image_ids", "error"),
        (changed(image_ids=["red", "blue"]), "ragged image counts", "note"),
        (changed(image_ids=["blue"]), "context about other images", "warning"),
        (changed(rel_ins_ids={}), "rel_ins_ids", "error"),
        ({"data": {**RECORDS, "r2": "text"}}, "record", "error"),
        ({"data": {**RECORDS, "r3": RECORDS["b"]}}, "repeated record", "warning"),
        ('{"data": {"r1": {"instruction": "q", "answer": "a"}, "r1": {}}}', "record twice", "error"),
        ({"meta": {}}, "unreadable file", "error"),
        ('{"data": {"r1"', "unreadable file", "error"),
    ],
)
def test_every_rule_of_records(tmp_path, dataset, content, rule, severity):
    write(tmp_path / "X_instructions.json", content)
    found = rules(check_mixture(mixture(tmp_path)))
    assert found[rule].severity == severity
    assert found[rule].task_group == "IMAGE_TEXT" and found[rule].dataset == "X"


@pytest.mark.parametrize(
    "config, rule",
    [
        ({"gone": []}, "unmatched context"),
        ({"r2": ["gone"]}, "unmatched context"),
        ({"r2": 3}, "train config"),
        ("{", "unreadable file"),
    ],
)
def test_every_rule_of_train_configs(tmp_path, dataset, config, rule):
    write(tmp_path / "X_train.json", config)
    assert rules(check_mixture(mixture(tmp_path)), "error")[rule].count == 1


def test_an_example_that_has_itself_as_context(tmp_path, dataset, caplog):
    """Its answer would stand in front of its question; training tells it, too."""
    write(tmp_path / "X_train.json", {"r2": ["r1", "r2"], "b": []})
    found = rules(check_mixture(mixture(tmp_path)))["its own context"]
    assert (found.severity, found.ids) == ("warning", ["r2"])
    MimicitMixture(mixture(tmp_path))
    assert "1 examples in" in caplog.text and "have themselves" in caplog.text


def test_pictures_that_are_not_shown(tmp_path, dataset):
    found = rules(check_mixture(mixture(tmp_path, "TEXT_ONLY", images_path=None)))["pictures that are not shown"]
    assert (found.severity, found.count) == ("warning", 3)


def test_an_example_that_is_named_twice(tmp_path, dataset):
    write(tmp_path / "X_train.json", '{"b": [], "r2": ["r1"], "b": []}')
    found = rules(check_mixture(mixture(tmp_path)))["example twice"]
    assert (found.severity, found.ids) == ("warning", ["b"])


@pytest.mark.parametrize(
    "settings, rule, severity",
    [
        ({"mimicit_path": "gone.json"}, "settings", "error"),
        ({"mimicit_path": ""}, "settings", "error"),
        ({"images_path": "gone.json"}, "settings", "error"),
        ({"num_samples": "5"}, "settings", "error"),
        ({"num_samples": True}, "settings", "error"),
        ({"task_description": {"a": 1}}, "settings", "error"),
        ({"mimicit_vt_path": "x"}, "unknown keys", "warning"),
    ],
)
def test_every_rule_of_settings(tmp_path, dataset, settings, rule, severity):
    assert rules(check_mixture(mixture(tmp_path, **settings)))[rule].severity == severity


@pytest.mark.parametrize(
    "content, rule",
    [
        ("a: [", "YAML"),
        ("- a", "YAML"),
        ({"IMAGES": {"X": {}}}, "task group"),
        ({"IMAGE_TEXT": ["X"]}, "task group"),
        ({"IMAGE_TEXT": {"X": "path"}}, "settings"),
        ({}, "no datasets"),
    ],
)
def test_every_rule_of_the_yaml(tmp_path, content, rule):
    report = check_mixture(write(tmp_path / "mix.yaml", content))
    assert rule in rules(report, "error") and not report.ok()


def test_a_missing_yaml_and_an_empty_group(tmp_path, dataset):
    (finding,) = check_mixture(tmp_path / "gone.yaml").findings
    assert "does not exist" in finding.message
    content = json.loads(mixture(tmp_path).read_text())
    report = check_mixture(write(tmp_path / "mix.yaml", {**content, "VIDEO_TEXT": None}))
    assert set(rules(report)) == {"empty group"} and report.ok() and not report.ok(strict=True)


def test_pictures_are_decoded(tmp_path, dataset):
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    write(tmp_path / "X.json", {"red": "AAAA", "blue": encode_base64(buffer.getvalue()[:3000]), "spare": "!"})
    report = check_mixture(mixture(tmp_path))
    found = rules(report)
    assert found["unreadable image"].ids == ["red"] and found["unreadable image"].severity == "error"
    assert found["truncated image"].ids == ["blue"] and found["truncated image"].severity == "warning"
    assert found["unused images"].severity == "note"
    assert report.datasets[0].unreadable_images == 1
    assert set(rules(check_mixture(mixture(tmp_path), decode_images=False))) == {"unused images"}


def test_one_id_for_two_pictures(tmp_path, dataset):
    write(tmp_path / "Y.json", {"red": dataset["blue"]})
    report = check_mixture(mixture(tmp_path, images_path=["X.json", "Y.json"]))
    assert "'red' stands for two different pictures" in rules(report, "error")["image store"].message


def test_image_stores_need_their_columns(tmp_path, dataset):
    pd.DataFrame({"base_64": ["x"]}, index=["red"]).to_parquet(tmp_path / "Y.parquet")
    report = check_mixture(mixture(tmp_path, images_path="Y.parquet"))
    assert "pictures as column base64 or image" in rules(report, "error")["image store"].message


def test_videos_need_frames_and_samples_need_records(tmp_path, dataset):
    write(tmp_path / "X_instructions.json", {"data": {"v": {"instruction": "q", "answer": "a"}}})
    report = check_mixture(mixture(tmp_path, "VIDEO_TEXT", train_config_path=None))
    assert rules(report, "error")["no frames"].ids == ["v"]
    write(tmp_path / "X_train.json", {})
    assert "no examples" in rules(check_mixture(mixture(tmp_path, num_samples=5)), "error")


def test_unmatched_ids_are_counted_per_dataset(tmp_path, by_colour):
    files = write_mimicit(tmp_path, "A", RECORDS, by_colour)
    write(tmp_path / "B.json", {"data": {f"x{i}": {**RECORDS["b"], "image_ids": [f"no{i}"]} for i in range(30)}})
    entries = [
        MixtureEntry("IMAGE_TEXT", "A", str(files.instructions_path), str(files.images_path)),
        MixtureEntry("IMAGE_TEXT", "B", str(tmp_path / "B.json"), str(files.images_path)),
    ]
    report = check_mixture(entries)
    assert [counts.unmatched_image_ids for counts in report.datasets] == [0, 30]
    (finding,) = (finding for finding in report.findings if finding.rule == "missing image")
    assert finding.count == 30 and len(finding.ids) == 30
    assert "IMAGE_TEXT/B: missing image (30 times)" in report.table()


def test_command(tmp_path, dataset, capsys):
    path, report = mixture(tmp_path), tmp_path / "new" / "report.json"
    assert main(["data", "check", str(path), "--strict", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["ok"] is True
    write(tmp_path / "X_instructions.json", changed(answer=""))
    assert main(["data", "check", str(path)]) == 0
    assert main(["data", "check", str(path), "--strict", "--json", str(report)]) == 1
    assert json.loads(report.read_text())["findings"][0]["ids"] == ["r2"]
    assert "warning: IMAGE_TEXT/X: empty answer" in capsys.readouterr().out
    write(tmp_path / "X_instructions.json", changed(answer=None))
    assert main(["data", "check", str(path)]) == 1


def test_files_at_addresses(tmp_path, dataset, capsys):
    """A mixture at an address, whose files lie beside it, and one here that names addresses; training reads both."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    pytest.importorskip("upath", reason="universal-pathlib is not installed: the extra scale")
    write(tmp_path / "X_instructions.json", changed(answer=""))
    expected = check_mixture(mixture(tmp_path))
    memory.makedirs(str(tmp_path))
    memory.put(f"{tmp_path}/", str(tmp_path), recursive=True)
    root = f"memory:/{tmp_path}"
    names = {key: f"{root}/X{end}.json" for key, end in NAMES.items()}
    for path in (f"{root}/mix.yaml", mixture(tmp_path, **names)):
        assert main(["data", "check", str(path), "--json", f"{root}/report.json", "--cache-dir", str(tmp_path)]) == 0
        found = json.loads(memory.cat_file(f"{tmp_path}/report.json"))
        assert found == json.loads(json.dumps(expected.to_dict()))
        for kind in (MimicitMixture, StreamedMixture):
            samples = {sample["id"]: sample["media"] for sample in kind(path, cache_dir=tmp_path, on_error="skip")}
            assert samples.keys() == {"r2", "b"} and all(samples.values())
    memory.rm(f"{tmp_path}/X.json")
    assert main(["data", "check", f"{root}/mix.yaml"]) == 1
    assert "the path X.json does not exist" in capsys.readouterr().out
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "yes"}]
    write(tmp_path / "rows.jsonl", {"messages": said, "images": ["a.png"]})
    memory.put(f"{tmp_path}/rows.jsonl", f"{tmp_path}/rows.jsonl")
    assert main(["data", "check", f"{root}/rows.jsonl"]) == 1
    assert f"{root}/rows.jsonl names a.png: media of rows at an address must be" in capsys.readouterr().out


NAMES = {"mimicit_path": "_instructions", "images_path": "", "train_config_path": "_train"}


@pytest.mark.slow
def test_workers_find_what_threads_do(tmp_path, dataset):
    pytest.importorskip("datatrove", reason="datatrove is not installed: the extra scale")
    write(tmp_path / "X.json", {**dataset, "blue": "bm8gcGljdHVyZQ=="})
    found = check_mixture(mixture(tmp_path), cache_dir=tmp_path / "cache")
    assert rules(found)["unreadable image"].ids == ["blue"]
    engine = Engine(workers=2, logging_dir=f"file://{tmp_path}/logs")
    assert check_mixture(mixture(tmp_path), cache_dir=tmp_path / "cache", engine=engine).to_dict() == found.to_dict()


def test_a_check_waits_for_its_answers(tmp_path, dataset):
    for engine in (Engine("slurm"), Engine("ray")):
        with pytest.raises(ValueError, match="A check waits for its answers"):
            check_mixture(mixture(tmp_path), engine=engine)
