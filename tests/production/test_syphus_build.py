"""Replies to MIMIC-IT datasets that pass the validator and train, and to translations."""

import json
import re

import pytest
import yaml
from PIL import Image
from test_syphus_queries import ANNOTATIONS, write_annotations

from otter_hf.cli import main
from otter_hf.data.formats import load_mimicit, write_mimicit
from otter_hf.data.mixture import MixtureEntry
from otter_hf.data.validate import check_mixture
from otter_hf.production.syphus import (
    DATASETS,
    LANGUAGES,
    ChatReply,
    FilterRules,
    SyphusRun,
    build_dataset,
    build_translations,
)


class Model:
    """Answers with what `answer` makes of the user's turn."""

    def __init__(self, answer, finish_reason="stop"):
        self.answer, self.finish_reason = answer, finish_reason

    def complete(self, messages):
        return ChatReply(self.answer(messages[-1]["content"]), self.finish_reason, 10, 5)


def pairs(count, topic="it"):
    return "\n".join(f"Question: What is {topic} {n}?\nAnswer: It is {n}." for n in range(count))


def answered(tmp_path, dataset, answer, content=None, name="run", **kwargs):
    """A run of a dataset's annotations, asked."""
    path = write_annotations(tmp_path / f"{name}.json", dataset, content)
    run = SyphusRun.create(tmp_path / name, dataset, path, "m", **kwargs)
    run.ask(Model(answer))
    return run


def store(tmp_path, *ids):
    """An image store of these ids."""
    records = {"R": {"instruction": "i", "answer": "a"}}
    pictures = {id: Image.new("RGB", (8, 8), (number, 0, 0)) for number, id in enumerate(ids)}
    return write_mimicit(tmp_path / "store", "pictures", records, pictures).images_path


def read(files):
    """`{id: record}` and the train config of a built dataset."""
    data = json.loads(files.instructions_path.read_text())["data"]
    return data, json.loads(files.train_config_path.read_text())


def check(files, images, group="IMAGE_TEXT"):
    """The strict validator, with no warning."""
    images = [str(images)] if images else ()
    entry = MixtureEntry(group, "x", str(files.instructions_path), images, str(files.train_config_path))
    report = check_mixture([entry])
    assert report.ok(strict=True), report.table()


REPLIES = {
    "3d.SceneNavigation": "Conversation 1 - Nap\nreason: bed\nHuman: Where?\nAssistant: There.\nHuman: Now?\n"
    "Assistant: Yes.\nConversation 2 - Read\nHuman: Here?\nAssistant: No.",
    "funqa.FunQA_translation": "CH2Eng Translation: He falls.\nExpansion_with_Eng_1: A fall.",
    "funqa.FunQA_mcqa": "Question: Who?\nOptions 1: He\nOptions 2: She\nAnswer: 1",
}
STORES = {
    "change.SpotTheDifference": ["SD_IMG_00012_1", "SD_IMG_00012_2", "SD_IMG_000120_1"],
    "change.CocoSpotTheDifference": ["CGD_IMG_9", "CGD_IMG_25", "CGD_IMG_251"],
    # videos v_x and v_x_0: the second one's frames are not the first one's
    "video.DenseCaptions": ["DC_IMG_v_x_0000", "DC_IMG_v_x_0001", "DC_IMG_v_x_0_0000", "DC_IMG_v_xy_0000"],
    "video.TVCaptions": [
        "TVC_IMG_bbt_s01e01_clip_00_2",
        "TVC_IMG_bbt_s01e01_clip_00_10",
        "TVC_IMG_castle_s01_clip_01_1",
    ],
    "video.VisualStoryTelling": ["VST_IMG_12", "VST_IMG_11", "VST_IMG_13"],
    "3d.SceneNavigation": [
        "SN_IMG_scene0000_00_color_0",
        "SN_IMG_scene0000_00_color_20",
        "SN_IMG_scene0000_00_color_3",
    ],
    "fpv.EGO4D": [f"E4D_IMG_vid_{second:08d}" for second in range(12)],
    "funqa.FunQA_translation": ["FunQA_IMG_H_1_0000", "FunQA_IMG_M_1_0000"],
    "funqa.FunQA_mcqa": ["FunQA_IMG_H_1_0000", "FunQA_IMG_H_1_0001"],
    "funqa.FunQA_dia": ["FunQA_IMG_H_1_0000", "FunQA_IMG_H_10_0000"],
}
IMAGE_IDS = {
    "change.SpotTheDifference": [[0, 1]],
    "change.CocoSpotTheDifference": [[0, 1]],
    "video.DenseCaptions": [[0, 1]],
    "video.TVCaptions": [[0, 1], [2]],
    "video.VisualStoryTelling": [[1, 0], [2]],
    "3d.SceneNavigation": [[0, 2, 1]],
    # seconds of the narrations, from 3.2 to 7.6 and 7.9
    "fpv.EGO4D": [[3, 4, 5, 6, 7, 8], [7, 8]],
    "funqa.FunQA_translation": [[0], [0], [1]],
    "funqa.FunQA_mcqa": [[0, 1]],
    "funqa.FunQA_dia": [[0]],
}


@pytest.mark.parametrize("dataset", STORES)
def test_from_annotations_to_a_dataset_of_every_kind(tmp_path, dataset):
    run = answered(tmp_path, dataset, lambda query: REPLIES.get(dataset, pairs(2)))
    images = store(tmp_path, *STORES[dataset])
    report = build_dataset([run], tmp_path / "out", images_path=images)
    short = DATASETS[dataset].short_name
    assert report.files.instructions_path.name == f"{short}_instructions.json"
    data, _ = read(report.files)
    found = list(dict.fromkeys(tuple(record["image_ids"]) for record in data.values()))
    expected = [[STORES[dataset][number] for number in numbers] for numbers in IMAGE_IDS[dataset]]
    assert found == list(dict.fromkeys(map(tuple, expected)))
    assert report.records == len(data) and report.left_out == {}
    check(report.files, images, "VIDEO_TEXT" if dataset == "fpv.EGO4D" else "IMAGE_TEXT")


def test_ids_and_context_of_pairs(tmp_path):
    run = answered(tmp_path, "video.TVCaptions", lambda query: pairs(3 if "1. A" in query else 1))
    report = build_dataset([run], tmp_path / "out", "T")
    data, config = read(report.files)
    assert list(data) == ["T_INS_00000", "T_INS_00001", "T_INS_00002", "T_INS_00003"]
    assert data["T_INS_00001"] == {
        "instruction": "What is it 1?",
        "answer": "It is 1.",
        "image_ids": [],
        "rel_ins_ids": ["T_INS_00000", "T_INS_00002"],
    }
    # as the original's tool derives it: what is context of another is no example of its own
    assert config == {"T_INS_00000": ["T_INS_00001", "T_INS_00002"], "T_INS_00003": []}
    check(report.files, (), "TEXT_ONLY")


def test_ids_and_context_of_conversations(tmp_path):
    dataset = "3d.SceneNavigation"
    report = build_dataset([answered(tmp_path, dataset, lambda query: REPLIES[dataset])], tmp_path / "out")
    data, config = read(report.files)
    first, second, third = (f"SN_00_INS_scene0000_00_activity{end}" for end in ("0_round0", "0_round1", "1_round0"))
    assert {id: record["rel_ins_ids"] for id, record in data.items()} == {first: [], second: [first], third: []}
    assert config == {second: [first], third: []}
    table, _ = load_mimicit(report.files.instructions_path, (), report.files.train_config_path)
    assert [row["instruction"] for row in table[0]["context"]] == ["Where?"]


def test_shards_build_what_one_run_builds(tmp_path):
    content = {f"v{number}": ANNOTATIONS["video.DenseCaptions"]["v_x"] for number in range(7)}
    runs = {}
    for count in (1, 3):
        runs[count] = [
            answered(tmp_path, "video.DenseCaptions", lambda q: pairs(2), content, f"{count}-{k}", shard=(k, count))
            for k in range(count)
        ]
        build_dataset(runs[count], tmp_path / str(count))
    assert (tmp_path / "1" / "DC_instructions.json").read_text() == (
        tmp_path / "3" / "DC_instructions.json"
    ).read_text()
    with pytest.raises(ValueError, match="Query 'v0' is in two of the runs"):
        build_dataset([runs[3][0], runs[3][0]], tmp_path / "twice")
    assert not (tmp_path / "twice" / "DC_instructions.json").exists()
    assert list((tmp_path / "twice").iterdir()) == []


def test_what_is_left_out_is_written_down(tmp_path, capsys):
    reply = (
        "Question: Good?\nAnswer: Yes.\nQuestion: Good?\nAnswer: yes\nQuestion: Long?\nAnswer: " + "word " * 11 + "\n"
        "Question: Dog?\nAnswer: As an AI language model, no.\nQuestion: Lost?"
    )
    run = answered(tmp_path, "change.SpotTheDifference", lambda query: reply)
    report = build_dataset([run], tmp_path / "out", rules=FilterRules(max_words=10))
    assert report.records == 1 and report.left_out == {
        "there is no answer to it": 1,
        "repeated pair": 1,
        "more than 10 words": 1,
        "forbidden words": 1,
    }
    lines = [json.loads(line) for line in report.invalid_path.read_text().splitlines()]
    assert lines[0] == {"id": "12", "response": "question: Lost?", "error_message": "there is no answer to it"}
    assert json.loads((tmp_path / "out" / "SD_build.json").read_text())["left_out"] == report.left_out
    arguments = ["--output", str(tmp_path / "cli"), "--forbid", "nothing", "--keep-repeated"]
    assert main(["syphus", "build", str(run.folder), *arguments]) == 0
    assert len(read(report.files)[0]) == 1
    assert len(json.loads((tmp_path / "cli" / "SD_instructions.json").read_text())["data"]) == 4
    assert main(["syphus", "build", str(run.folder), "--output", str(tmp_path / "cli"), "--languages", "zh"]) == 2
    assert "--languages means nothing for runs of change.SpotTheDifference: leave it out." in capsys.readouterr().err


@pytest.mark.parametrize("end, records", [("", 1), ("\nQuestion: And th", 2), ("\nQuestion: And?\nAnswer", 2)])
def test_only_what_the_limit_of_tokens_cut_off_is_left_out(tmp_path, end, records):
    path = write_annotations(tmp_path / "a.json", "change.SpotTheDifference")
    run = SyphusRun.create(tmp_path / "run", "change.SpotTheDifference", path, "m")
    run.ask(Model(lambda query: pairs(2) + end, "length"))
    report = build_dataset([run], tmp_path / "out")
    reason = "there is no answer to it" if end else "cut off at the limit of tokens"
    assert report.records == records and report.left_out == {reason: 1}


def test_rounds_behind_one_that_is_left_out_go_too(tmp_path):
    reply = "Human: A?\nAssistant: B.\nHuman: C?\nAssistant: I cannot see it.\nHuman: E?\nAssistant: F."
    run = answered(tmp_path, "3d.SceneNavigation", lambda query: reply)
    report = build_dataset([run], tmp_path / "out")
    assert report.records == 1 and report.left_out == {"forbidden words": 1, "behind a round that is left out": 1}


def test_pairs_without_pictures_are_left_out(tmp_path):
    run = answered(tmp_path, "video.VisualStoryTelling", lambda query: pairs(2))
    report = build_dataset([run], tmp_path / "out", images_path=store(tmp_path, "VST_IMG_12"))
    data, _ = read(report.files)
    assert [record["image_ids"] for record in data.values()] == [["VST_IMG_12"]] * 2
    assert report.left_out == {"no pictures in the image store": 2}
    images = store(tmp_path / "other", "X_12", "X_13")
    with pytest.raises(ValueError, match="must begin with 'VST_IMG_' .image_prefix.; the store has .'X_12'. and so"):
        build_dataset([run], tmp_path / "out", images_path=images)
    report = build_dataset([run], tmp_path / "out", images_path=images, image_prefix="X_")
    assert report.records == 4


def test_nothing_to_build(tmp_path):
    run = answered(tmp_path, "change.SpotTheDifference", lambda query: "no")
    with pytest.raises(ValueError, match="Nothing of 1 queries can be used; left out: {'there is no question"):
        build_dataset([run], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    other = answered(tmp_path, "video.DenseCaptions", lambda query: "no", name="other")
    with pytest.raises(ValueError, match="needs runs over one kind of annotations"):
        build_dataset([run, other], tmp_path / "out")
    with pytest.raises(ValueError, match="needs runs of translate.Translation"):
        build_translations([run], tmp_path / "x.json", tmp_path / "out", "X")


def test_a_built_dataset_trains(tmp_path, model, processor, monkeypatch):
    from otter_hf.training.run import main as train

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    content = [{"img_id": str(n), "sentences": ["x"]} for n in range(3)]
    run = answered(tmp_path, "change.SpotTheDifference", lambda query: pairs(2), content)
    images = store(tmp_path, *(f"SD_IMG_0000{n}_{half}" for n in range(3) for half in (1, 2)))
    files = build_dataset([run], tmp_path / "out", images_path=images).files
    entry = {"mimicit_path": str(files.instructions_path), "images_path": str(images)}
    mixture = {"IMAGE_TEXT": {"SD": {**entry, "train_config_path": str(files.train_config_path)}}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(mixture))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    paths = {"model_name_or_path": "base", "train_mixture": "data.yaml", "output_dir": "trained"}
    arguments = [part for key, path in paths.items() for part in (f"--{key}", str(tmp_path / path))]
    fixed = "--use_cpu True --per_device_train_batch_size 3 --disable_tqdm True --max_steps 2 --logging_steps 1"
    train([*arguments, *fixed.split(), "--learning_rate", "1e-2"])
    history = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


TEXTS = {
    "zh": "这里有一只狗",
    "es": "Hay un perro",
    "ja": "犬がいます",
    "de": "Hier ist ein Hund",
    "fr": "Il y a un chien",
    "ko": "개가 있습니다",
    "ar": "يوجد كلب هنا",
}


@pytest.fixture
def original(tmp_path):
    """Three records with pictures and context, the last a context of the first."""
    records = {
        "X_1": {"instruction": "What can be seen here?", "answer": "There is a dog.", "rel_ins_ids": ["X_3"]},
        "X_2": {"instruction": "Who?", "answer": "Tom", "rel_ins_ids": []},
        "X_3": {"instruction": "What is in the picture?", "answer": "There is a dog.", "rel_ins_ids": []},
    }
    records = {id: {**record, "image_ids": ["I_1"]} for id, record in records.items()}
    return write_mimicit(tmp_path / "x", "X", records, {"I_1": Image.new("RGB", (4, 4))}, {"X_1": ["X_3"], "X_2": []})


def translate(query):
    a, b = re.fullmatch(r"<a>(.*)</a><b>(.*)</b>", query).groups()
    reply = {"a": dict(TEXTS), "b": dict(TEXTS)}
    if b == "Tom":
        reply["b"] = dict.fromkeys(LANGUAGES, "Tom")  # a name is the same everywhere
    if a == "What is in the picture?":
        del reply["b"]["fr"]
        reply["a"]["ko"] = "What is in the picture?"
    # what models add
    return "```json\n" + json.dumps(reply, ensure_ascii=False).replace('"},', '",},') + "\n```"


def test_translations(tmp_path, original, capsys):
    run = SyphusRun.create(tmp_path / "run", "translate.Translation", original.instructions_path, "m")
    run.ask(Model(translate))
    arguments = ["--images", str(original.images_path), "--train-config", str(original.train_config_path)]
    assert (
        main(["syphus", "build", str(run.folder), "--output", str(tmp_path / "out"), "--name", "X", *arguments]) == 0
    )
    assert "fr: 2 records, 1 left out" in capsys.readouterr().out
    assert main(["syphus", "build", str(run.folder), "--output", "x", "--forbid", "nothing"]) == 2
    assert "--forbid means nothing for runs of translate.Translation" in capsys.readouterr().err
    for language in LANGUAGES:
        table, images = load_mimicit(
            tmp_path / "out" / f"X_{language}_instructions.json",
            original.images_path,
            tmp_path / "out" / f"X_{language}_train.json",
        )
        incomplete = language in ("fr", "ko")
        assert table["id"] == ["X_1", "X_2"] and table[0]["instruction"] == TEXTS[language]
        assert (table[1]["instruction"], table[1]["answer"]) == (TEXTS[language], "Tom")
        assert all(row["image_ids"] == ["I_1"] for row in table) and "I_1" in images
        assert [row["id"] for row in table[0]["context"]] == ([] if incomplete else ["X_3"])
        data = json.loads((tmp_path / "out" / f"X_{language}_instructions.json").read_text())["data"]
        assert list(data) == (["X_1", "X_2"] if incomplete else ["X_1", "X_2", "X_3"])
        assert data["X_1"]["rel_ins_ids"] == ([] if incomplete else ["X_3"])
        paths = [str(tmp_path / "out" / f"X_{language}_{end}.json") for end in ("instructions", "train")]
        report = check_mixture([MixtureEntry("IMAGE_TEXT", "X", paths[0], [str(original.images_path)], paths[1])])
        assert report.ok(), report.table()
    reasons = {
        language: json.loads((tmp_path / "out" / f"X_{language}_invalid.jsonl").read_text())["error_message"]
        for language in ("fr", "ko")
    }
    assert reasons == {"fr": "there is no fr in 'b'", "ko": "the instruction is not in ko"}


def test_broken_translations(tmp_path, original):
    run = SyphusRun.create(tmp_path / "run", "translate.Translation", original.instructions_path, "m")
    run.ask(Model(lambda query: translate(query) if "Tom" in query else translate(query)[:60]))
    report = build_translations(
        [run], original.instructions_path, tmp_path / "out", "X", original.images_path, languages=["de"]
    )
    assert report.records == {"de": 1} and sum(report.left_out["de"].values()) == 2
    with pytest.raises(ValueError, match="languages must be some of zh, es, .* got \\['xx'\\]"):
        build_translations([run], original.instructions_path, tmp_path / "out", "X", languages=["xx"])
    with pytest.raises(ValueError, match="are built by build_translations"):
        build_dataset([run], tmp_path / "out")
