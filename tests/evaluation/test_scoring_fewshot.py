"""Scores of few-shot tests against numbers worked out by hand, and how scores are drawn again."""

import pytest

from otter_hf.evaluation.benchmarks import BENCHMARKS
from otter_hf.evaluation.scoring import captions, ranking, vqa


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_annotator_out_once(agreeing, expected):
    answers = ["cat"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa.accuracy("Cat", answers, str.lower) == pytest.approx(expected)


def test_vqa_answers_are_normalised_as_the_official_code_does():
    pytest.importorskip("lmms_eval")
    normalise = vqa.answer_normaliser()
    assert vqa.accuracy("The two dogs!", ["2 dogs"] * 10, normalise) == 1.0
    assert vqa.clean_reply("dog, cat Question") == "dog"
    assert vqa.clean_reply("<think>A dog, or</think>cat") == "cat"
    assert vqa.clean_reply("[LMMS_EVAL_REQUEST_FAILED after 5] x") == ""
    # the authors' code and the challenge server's differ in commas
    assert normalise("red,blue") == "red blue" and vqa.answer_normaliser("evalai")("red,blue") == "redblue"
    assert normalise("1,000") == "1000"
    assert vqa.accuracy("", [""] * 10, normalise) == 0.0
    with pytest.raises(ValueError, match="official, evalai"):
        vqa.answer_normaliser("other")


def test_cider_is_largest_for_the_references_and_says_its_tokenizer(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr("shutil.which", lambda name: None)
    references = {0: ["a dog runs in the park", "the dog is running"], 1: ["two red cars", "red cars on a road"]}

    def score(first, second):
        replies = (first, second)
        records = [{"id": i, "caption": replies[i], "references": references[i]} for i in references]
        return captions.score(records)

    same = score("A dog runs in the park.", "two red cars")
    assert same["tokenizer"] == "python" and same["images"] == 2
    assert same["cider"] > score("a dog in the park", "two cars")["cider"] > score("xyz", "abc")["cider"] == 0.0


@pytest.mark.parametrize("tokenizer", ["PTB", "python"])
def test_an_odd_character_in_a_caption_shifts_no_other(tokenizer, monkeypatch):
    """The Java tokenizer takes captions by the line, and these all end one."""
    import shutil

    pytest.importorskip("pycocoevalcap")
    if tokenizer == "python":
        monkeypatch.setattr("shutil.which", lambda name: None)
    elif shutil.which("java") is None:
        pytest.skip("java is not installed")
    texts = ["a dog runs in the park", "two red cars on a road", "a cat on the mat", "a man rides a horse"]

    def score(odd: str) -> dict:
        return captions.score(
            [
                {
                    "id": i,
                    "caption": text.replace(" ", odd, 1),
                    "references": [f"{text} today", text.replace(" ", odd)],
                }
                for i, text in enumerate(texts)
            ]
        )

    clean = score(" ")
    assert clean["tokenizer"] == tokenizer and clean["cider"] > 100
    assert score("\r\f\u2028\x85\x0b\n\x00") == clean


def test_our_tokenizer_agrees_with_the_official_one_where_java_is():
    import shutil

    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("java, which the official tokenizer needs, is not installed")
    texts = [
        "A dog's ball, isn't it?",
        'Two men (one with a "hat") - running!',
        "The well-known 3.5 mile road... ends; here: now",
        "I'll say they've won.",
    ]
    official = tokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [captions.tokenize(text) for text in texts] == [official[i][0] for i in range(len(texts))]


def test_ranking_and_the_area_under_the_curve():
    assert ranking.roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert ranking.roc_auc([0.5, 0.5], [0, 1]) == 0.5
    assert ranking.roc_auc([0.5], [1]) is None
    # log-likelihoods of (no, yes): P(yes) orders the rows, not the winner's probability
    rows = [([-1.0, -5.0], 0), ([-1.0, -1.5], 1), ([-4.0, -3.0], 1), ([-2.0, -1.8], 0)]
    score = ranking.score_binary([{"log_likelihoods": pair, "label": label} for pair, label in rows])
    assert score == {"roc_auc": 75.0, "accuracy": 50.0, "questions": 4}
    assert (ranking.likelihood(-6.0, 3, "sum"), ranking.likelihood(-6.0, 3, "mean")) == (-6.0, -2.0)
    many = ranking.score([{"log_likelihoods": [-3.0, -1.0, -2.0], "label": 2}])
    assert many == {"top1_accuracy": 0.0, "top5_accuracy": 100.0, "questions": 1}


def test_questions_of_several_rows_are_drawn_together():
    """MME's two questions about a picture, the turned copies of one of MMBench's."""
    shown = [
        {"category": "existence", "image_id": image, "answer": answer, "prediction": answer.lower()}
        for image in range(10)
        for answer in ("Yes", "No")
    ]
    swapped = [{**record, "prediction": "yes"} for record in shown]
    told = BENCHMARKS["otter_mme"].gains(shown, swapped, swapped)["perception"]
    assert told == {"swapped": 50.0, "blank": 50.0, "visual_gain": 150.0, "interval": [150.0, 150.0]}
    shown = [
        {"index": number + turn * 1_000_000, "category": "a", "answer": "A", "prediction": "A"}
        for number in range(20)
        for turn in range(3)
    ]
    # of every other question one copy is answered otherwise
    swapped = [{**r, "prediction": "B"} if r["index"] % 2 == 0 and r["index"] > 2_000_000 - 1 else r for r in shown]
    told = BENCHMARKS["otter_mmbench"].gains(shown, swapped, shown)["circular_accuracy"]
    assert (told["swapped"], told["blank"], told["visual_gain"]) == (50.0, 100.0, 50.0)
    low, high = told["interval"]
    assert 20 < low < 40 and 60 < high < 80
    # without answers there is no score
    unknown = [{**record, "answer": None} for record in shown]
    assert BENCHMARKS["otter_mmbench"].gains(unknown, unknown, unknown) == {}
