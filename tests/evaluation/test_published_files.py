"""The benchmarks' files as their authors publish them."""

import base64
import json
from io import BytesIO

import pytest
import yaml
from benchmark_rows import BLUE, RED, endpoint, write_parquet
from datasets import Dataset
from PIL import Image as PILImage

from otter_hf.cli import main
from otter_hf.evaluation.benchmarks import Options, mme_record
from otter_hf.evaluation.config import DatasetSpec
from otter_hf.evaluation.fewshot.rows import Rows
from otter_hf.evaluation.fewshot.run import run_fewshot
from otter_hf.evaluation.published import read_published, write_table
from otter_hf.evaluation.scoring import mme


def save(folder, *names, picture=RED):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)


def dump(path, content):
    path.write_text(json.dumps(content))
    return path


def test_pope(tmp_path):
    save(tmp_path, "val2014/a.png")
    for category, label in (("random", "no"), ("popular", "yes")):
        rows = [{"question_id": i, "image": "a.png", "text": f"Is there a {i}?", "label": label} for i in (1, 2)]
        text = "\n".join(map(json.dumps, rows[: 1 if category == "random" else 2]))  # one line is JSON, too
        (tmp_path / f"coco_pope_{category}.json").write_text(text + "\n")
    rows = read_published("pope", tmp_path, "test")
    assert [(row["category"], row["question"], row["answer"]) for row in rows] == [
        ("popular", "Is there a 1?", "yes"),
        ("popular", "Is there a 2?", "yes"),
        ("random", "Is there a 1?", "no"),
    ]
    assert all(row["image"] == str(tmp_path / "val2014" / "a.png") for row in rows)
    with pytest.raises(ValueError, match="picture of row 1, a.png, is not in .*; say where with `image_dir`"):
        read_published("pope", tmp_path / "coco_pope_random.json", "test", tmp_path / "nowhere")
    for name in ("../val2014/a.png", str(tmp_path / "val2014" / "a.png")):
        outside = dump(tmp_path / "coco_pope_outside.json", [{**rows[0], "image": name, "text": "?", "label": "no"}])
        with pytest.raises(ValueError, match="The picture of row .* leads out of the folder of the pictures"):
            read_published("pope", outside, "test", tmp_path / "val2014")


def test_mme_is_a_folder_of_categories(tmp_path):
    """Pictures lie beside their questions, or both in folders of their own."""
    tmp_path = tmp_path / "MME_Benchmark_release_version"
    save(tmp_path, "OCR/0001.jpg", "artwork/images/7.png")
    asked = "Is it {}? Please answer yes or no.\t{}"
    words = "\r\n".join([asked.format("red", "Yes"), asked.format("blue", "No")])
    (tmp_path / "artwork" / "questions_answers_YN").mkdir()
    for name in ("OCR/0001.txt", "artwork/questions_answers_YN/7.txt"):
        (tmp_path / name).write_text(words + "\n")
    (tmp_path / "eval_tool").mkdir()
    (tmp_path / "eval_tool" / "readme.txt").write_text("no question")
    rows = read_published("mme", tmp_path, "test")
    assert rows == read_published("mme", tmp_path.parent, "test")
    assert [(row["category"], row["answer"]) for row in rows] == [
        *(("OCR", "Yes"), ("OCR", "No"), ("artwork", "Yes"), ("artwork", "No")),
    ]
    assert rows[0]["question"] == "Is it red? Please answer yes or no." and rows[2]["image"].endswith("7.png")
    write_table(tmp_path / "mme.parquet", rows)
    records = [mme_record(row, ["Yes"], Options()) for row in Dataset.from_parquet(str(tmp_path / "mme.parquet"))]
    assert mme.score(records)["category/ocr"] == 50 and mme.score(records)["incomplete_images"] == 0
    (tmp_path / "OCR" / "0001.txt").write_text("Is it red? Yes")
    with pytest.raises(ValueError, match="Line 1 of .*0001.txt is no question, tab and Yes or No: 'Is it red"):
        read_published("mme", tmp_path, "test")
    (tmp_path / "OCR" / "0001.jpg").unlink()
    with pytest.raises(ValueError, match="The picture of .*0001.txt, 0001.jpg or 0001.png, is not in"):
        read_published("mme", tmp_path, "test")


@pytest.mark.parametrize("separator", ["\t", ","], ids=["tsv", "csv"])
def test_mmbench_with_pictures_by_index(separator, tmp_path):
    def encoded(picture):
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    names = ("index", "question", "hint", "A", "B", "answer", "image")
    lines = [names, ("7", "q?", "", "None", "NA", "A", encoded(RED)), ("1000007", "q?", "", "NA", "None", "B", "7")]
    lines.append(("8", "r?", "look", "x", "", "A", encoded(BLUE)))
    path = tmp_path / ("m.tsv" if separator == "\t" else "m.csv")
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    first, copy, other = read_published("mmbench", path, "dev")
    assert first["image"] is copy["image"] and copy["image"] != other["image"]
    assert (first["A"], first["B"], other["B"], first["hint"], copy["index"]) == ("None", "NA", None, None, 1000007)
    path.write_text(path.read_text().replace(f"{separator}7\n", f"{separator}9\n"))
    with pytest.raises(ValueError, match="Row 1000007 of .* has no picture: its image is '9'"):
        read_published("mmbench", path, "dev")


def test_mathvista_scienceqa_seedbench_mmvet(tmp_path):
    save(tmp_path, "images/1.jpg", "test/5/image.png", "pictures/v1.png", "pictures/7.jpg")
    row = {
        "question": "q",
        "image": "images/1.jpg",
        "choices": ["a", "b"],
        "answer": "a",
        "question_type": "multi_choice",
    }
    row |= {"answer_type": "text", "metadata": {"skills": ["algebra"], "grade": None}}
    (read,) = read_published("mathvista", dump(tmp_path / "testmini.json", {"1": row}), "testmini")
    assert read["pid"] == "1" and read["choices"] == ["a", "b"] and read["metadata"].startswith("{'skills'")

    common = {"choices": ["x", "y"], "answer": 1, "hint": "", "split": "test", "grade": "grade3"}
    problems = {
        "4": {**common, "question": "no picture", "image": None},
        "5": {**common, "question": "q", "image": "image.png"},
    }
    problems["6"] = {**common, "question": "train", "image": None, "split": "train"}
    rows = read_published("scienceqa", dump(tmp_path / "problems.json", problems), "test")
    assert [(row["id"], row["image"] is not None) for row in rows] == [("4", False), ("5", True)]
    with pytest.raises(ValueError, match="no rows of the split 'dev'; it has test, train"):
        read_published("scienceqa", tmp_path / "problems.json", "dev")

    seed = {"question": "q", **{f"choice_{c}": c for c in "abcd"}, "answer": "A", "data_type": "image", "data_id": "7"}
    seed |= {"question_id": "1", "question_type_id": 1}
    content = {"questions": [seed, {**seed, "data_type": "video"}], "question_type": {"Scene": 1}}
    (read,) = read_published("seedbench", dump(tmp_path / "SEED-Bench.json", content), "test")
    assert read["image"].endswith("7.jpg")

    content = {"v1": {"imagename": "v1.png", "question": "q", "answer": "2<AND>3", "capability": ["rec"]}}
    (read,) = read_published("mmvet", dump(tmp_path / "mm-vet.json", content), "test")
    assert (read["id"], read["capability"]) == ("v1", ["rec"])
    # other files are tables
    assert read_published("mme", tmp_path / "mm-vet.json", "test") is None
    assert read_published("pope", dump(tmp_path / "table.json", [{"question": "q"}]), "test") is None


def test_vqa_challenge_files(tmp_path):
    save(tmp_path, "val2014/COCO_val2014_000000000042.jpg")
    question = {"question_id": 420, "image_id": 42, "question": "What?"}
    answers = [{"answer": "cat", "answer_id": i, "answer_confidence": "yes"} for i in range(10)]
    source = {
        "questions": str(dump(tmp_path / "q.json", {"questions": [question], "data_subtype": "val2014"})),
        "annotations": str(
            dump(tmp_path / "a.json", {"annotations": [{**question, "answers": answers, "answer_type": "other"}]})
        ),
    }
    row = Rows(source, "test", "vqa")[0]
    assert (row["id"], row["question"], row["answers"]) == (420, "What?", ["cat"] * 10)
    assert row["answer_type"] == "other"
    with pytest.raises(ValueError, match="one half of the VQA challenge's files"):
        Rows(source["questions"], "test", "vqa")
    dump(tmp_path / "a.json", {"annotations": []})
    with pytest.raises(ValueError, match="Question 420 of .* has no answers in"):
        Rows(source, "test", "vqa")


def test_karpathys_split_and_coco_captions(tmp_path):
    save(tmp_path, "val2014/a.jpg", "train2014/b.jpg", "val2014/c.jpg")
    rows = [("val2014", "a.jpg", "test"), ("train2014", "b.jpg", "train"), ("val2014", "c.jpg", "restval")]
    images = [
        {"filepath": f, "filename": n, "split": s, "cocoid": i, "sentences": [{"raw": f"caption {n}"}, {"raw": "x"}]}
        for i, (f, n, s) in enumerate(rows)
    ]
    path = dump(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert [row["captions"][0] for row in map(Rows(str(path), "test", "caption").__getitem__, [0])] == [
        "caption a.jpg"
    ]
    assert len(Rows(str(path), "train", "caption", image_dir=str(tmp_path))) == 2
    of_restval = {"train": str(path), "test": str(path), "test_split": "val"}
    with pytest.raises(ValueError, match="has no rows of the split 'val'"):
        run_fewshot(None, DatasetSpec("coco", fewshot=of_restval), tmp_path)

    content = {
        "images": [{"id": 9, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 9, "caption": c} for c in "yz"],
    }
    assert Rows(str(dump(tmp_path / "captions.json", content)), "test", "caption")[0]["captions"] == ["y", "z"]


def test_vizwiz_and_rows_without_what_the_form_has(tmp_path):
    save(tmp_path, "val/VizWiz_val_00000001.jpg", "7.jpg")
    row = {"image": "VizWiz_val_00000001.jpg", "question": "What?", "answers": [{"answer": "cat"}]}
    assert Rows(str(dump(tmp_path / "val.json", [row])), "test", "vqa")[0]["answers"] == ["cat"]
    with pytest.raises(ValueError, match="A row of .*v.json has no 'answers'"):
        Rows(str(dump(tmp_path / "v.json", [{"image": row["image"], "question": "q"}])), "test", "vqa")
    with pytest.raises(ValueError, match="A row of .*k.json has no 'split'"):
        Rows(str(dump(tmp_path / "k.json", {"images": [{"filename": "7.jpg"}]})), "test", "caption")
    image = {"filename": "7.jpg", "split": "train", "cocoid": 7, "sentences": [{"raw": "x"}]}
    with pytest.raises(ValueError, match="has no rows of the split 'test'"):
        Rows(str(dump(tmp_path / "k.json", {"images": [image]})), "test", "caption")
    question = {"question_id": "1", "image_id": 7, "question": "What?"}  # the other file has the number
    source = {
        "questions": str(dump(tmp_path / "q.json", {"questions": [question]})),
        "annotations": str(dump(tmp_path / "a.json", {"annotations": [{"question_id": 1, "answers": ["x"]}]})),
    }
    assert Rows(source, "test", "vqa")[0]["answers"] == ["x"]


def test_lines_and_tables_that_are_broken_are_named(tmp_path):
    save(tmp_path, "a.png")
    row = json.dumps({"question_id": 1, "image": "a.png", "text": "Is\u2028there?", "label": "no"}, ensure_ascii=False)
    path = tmp_path / "coco_pope_random.json"
    path.write_text(f"\ufeff{row}\n\n{row}\n", encoding="utf-8")
    assert [row["question"] for row in read_published("pope", path, "test")] == ["Is\u2028there?"] * 2
    path.write_text(f"{row}\n\n{row[:-3]}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="coco_pope_random.json is neither JSON nor JSON lines: line 3"):
        read_published("pope", path, "test")
    path = tmp_path / "m.tsv"
    for text, message in (
        ("", "cannot be read as a table"),
        ("index\tquestion\timage\n1\tq\t" + "!" * 40, "picture of row 1 of .* is no base64"),
        ("index\tquestion\timage\nx\tq\t" + "A" * 40, "has the index 'x', which is no whole number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"m.tsv {message}" if "picture" not in message else message):
            read_published("mmbench", path, "test")


def test_a_table_of_rows_is_read_by_its_benchmark(tmp_path):
    from datasets import load_dataset

    from otter_hf.evaluation.benchmarks import images, images_if_any

    save(tmp_path, "a.png")
    buffer = BytesIO()
    BLUE.save(buffer, "PNG")
    rows = [
        {"id": 1, "image": str(tmp_path / "a.png")},
        {"id": 2, "image": buffer.getvalue()},
        {"id": 3, "image": None},
    ]
    write_table(tmp_path / "data" / "t.parquet", rows)
    table = load_dataset("parquet", data_files=str(tmp_path / "data" / "t.parquet"), split="train")
    assert [[picture.getpixel((0, 0)) for picture in images_if_any(row)] for row in table] == [
        [(255, 0, 0)],
        [(0, 0, 255)],
        [],
    ]
    with pytest.raises(ValueError, match="Row '3' has no picture"):
        images(table[2])


def test_rows_are_chosen_without_reading_their_pictures(tmp_path, monkeypatch):
    from datasets import Image, load_dataset

    from otter_hf.evaluation.benchmarks import magnifierbench_rows, scienceqa_rows

    buffer = BytesIO()
    PILImage.effect_noise((64, 48), 90).convert("RGB").save(buffer, "JPEG", quality=30)
    noise = PILImage.open(buffer)
    rows = [{"image": picture, "images": [noise] * count} for picture, count in ((noise, 1), (None, 2), (RED, 1))]
    table = load_dataset("parquet", data_files=str(write_parquet(tmp_path / "t.parquet", rows)), split="train")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "decode_example", lambda *arguments, **options: pytest.fail("a picture is read"))
        # data may have been told before
        told, single = scienceqa_rows(scienceqa_rows(table)), magnifierbench_rows(table)
    assert told["has_image"] == [True, False, True] and len(single) == 2
    for before, after in (((table, 0), (told, 0)), ((table, 2), (single, 1))):
        cells = [data.cast_column("image", Image(decode=False))[number]["image"] for data, number in (before, after)]
        assert cells[0] == cells[1]


def test_figures_from_a_published_file(tmp_path, monkeypatch):
    """MathVista without a judge: the letter that its query asks for is an answer."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (docs/evaluation.md)")
    save(tmp_path, "images/1.jpg", "images/2.jpg")
    row = {"choices": ["a", "b"], "answer": "b", "question_type": "multi_choice", "answer_type": "text"}
    rows = {pid: {**row, "question": f"q{pid}", "image": f"images/{pid}.jpg"} for pid in "12"}
    dataset = {"name": "mathvista", "data_path": str(dump(tmp_path / "testmini.json", rows))}
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with endpoint(lambda text: "(B)" if "Question: q1" in text else "") as (address, _):
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        models = [{"name": "stub", "endpoint": address, "model": "stub"}]
        config = {"models": models, "datasets": [dataset], "output": str(tmp_path / "out")}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        assert main(["eval", str(tmp_path / "c.yaml")]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["stub"]["mathvista"]
    assert (figures["accuracy"], figures["extraction_failures"], figures["empty_replies"]) == (50.0, 1, 1)
