"""Every score against numbers worked out by hand."""

import benchmark_rows
import pytest

from otter_hf.evaluation.benchmarks import BENCHMARKS, Options, scienceqa_answer
from otter_hf.evaluation.scoring import (
    magnifierbench,
    mathvista,
    mmbench,
    mme,
    mmvet,
    pope,
    replies,
    scienceqa,
    seedbench,
)
from otter_hf.evaluation.scoring.choices import parse_choice


OPTIONS = {"A": "dog", "B": "cat", "C": "black cat", "D": "blue"}
INSTRUCTION = "What is it? A. dog, B. cat, C. black cat, D. blue"


@pytest.mark.parametrize(
    ("reply", "letter", "in_2023"),
    [
        ("B", "B", "B"),
        ("b", "B", "B"),
        ("(B) cat", "B", "B"),
        ("B. cat", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("The answer is (D)", "D", "D"),
        ("answer: C", "C", "C"),
        ("I would choose D", "D", "D"),
        ("A cat", "B", "A"),
        ("The answer is A cat", "B", "A"),
        ("The answer is A", "A", "A"),
        ("It is a Black Cat.", "C", "B"),
        ("a dog", "A", "A"),
        ("Dog", "A", "D"),
        ("Between A and B", "other", "A"),
        ("cat and dog", "other", "A"),
        ("I am not sure", "other", "A"),  # upper-cased it has an A
        ("hmm", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_magnifierbench_reads_the_letter_that_is_meant(reply, letter, in_2023):
    assert parse_choice(reply, OPTIONS) == letter
    assert magnifierbench.parse_answer(reply, INSTRUCTION) == letter
    assert magnifierbench.parse_answer(reply, INSTRUCTION, legacy=True) == in_2023


def test_an_instruction_is_a_question_and_four_options():
    question, options = magnifierbench.split_instruction(
        "Which car, the U.S. one? A. red, B. v. small, C. 2.5, D. no."
    )
    assert question == "Which car, the U.S. one?"
    assert options == {"A": "red", "B": "v. small", "C": "2.5", "D": "no"}
    # neither a question mark nor an option's letter in the question is in the way
    for asked in ("Name the animal.", "Who holds vitamin A. then?", "Is it J. B. Dog?", "Dog or cat?"):
        question, options = magnifierbench.split_instruction(f"{asked} A. dog, B. cat, C. a, D. b")
        assert (question, list(options.values())) == (asked, ["dog", "cat", "a", "b"])
    for text in ("What is it? A. dog, B. cat", "A. dog, B. cat, C. bird, D. fish", "What?", ""):
        with pytest.raises(ValueError, match="followed by"):
            magnifierbench.split_instruction(text)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("yes", "yes"), ("Yes.", "yes"), ("No!", "no"), ("Maybe", "invalid"), ("yes it is", "invalid"), ("", "invalid")],
)
def test_verdicts_of_the_judge(reply, verdict):
    assert magnifierbench.parse_verdict(reply) == verdict


def test_what_was_not_judged_is_counted_and_counts_as_wrong():
    records = [{"verdict": verdict} for verdict in ("yes", "yes", "no", "invalid", "failed")]
    assert magnifierbench.score_freeform(records) == {
        "freeform_accuracy": 40.0,
        "freeform_accuracy_of_judged": pytest.approx(200 / 3),
        "judge_invalid": 1,
        "judge_failed": 1,
        "questions": 5,
    }


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes", "yes"),
        (" no. ", "no"),
        ("Yes, there is.", "yes"),
        ("No, it is not", "no"),
        ("It is, yes", "other"),
        ("y", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(reply, answer):
    assert mme.parse_answer(reply) == answer


def mme_records(replies: list[str]) -> list[dict]:
    """Two images of existence, one of code; the truth is yes, no for each."""
    places = [("existence", "a"), ("existence", "b"), ("code", "c")]
    truths = [(category, image, answer) for category, image in places for answer in ("Yes", "No")]
    return [
        {"category": category, "image_id": image, "answer": answer, "prediction": reply}
        for (category, image, answer), reply in zip(truths, replies, strict=False)
    ]


def test_mme_gives_100_points_for_questions_and_100_for_whole_images():
    always_yes = mme.score(mme_records(["yes"] * 6))
    assert always_yes["perception"] == 50.0 and always_yes["cognition"] == 50.0
    right = mme.score(mme_records(["yes", "no"] * 3))
    assert right["perception"] == 200.0 and right["category/code_reasoning"] == 200.0
    # image a: both right; b: one of two: 75 + 50
    mixed = mme.score(mme_records(["yes", "no", "yes", "other", "no", "yes"]))
    assert mixed["category/existence"] == 125.0 and mixed["cognition"] == 0.0 and mixed["unparsed"] == 1


def test_mme_leaves_out_an_image_that_a_limit_cut():
    cut = mme.score(mme_records(["yes", "no", "yes"]))
    assert cut["perception"] == 200.0 and cut["incomplete_images"] == 1


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Yes, there is.", "yes"),
        ("No, not at all", "no"),
        ("There is not a dog", "no"),
        ("I see. No dog", "yes"),  # only the first sentence counts
        ("Nothing here", "yes"),  # the official rule looks for whole words
        ("No!", "no"),
        ("**No**", "no"),
        ('"NO"', "no"),
        ("No\n\nThe picture shows a cat", "no"),
        ("No—none", "no"),
        ("1. ", "yes"),
        ("<think>There is no dog? Yes there is.</think>Yes", "yes"),
        ("so no.</think>\n\nNo", "no"),
        ("", "other"),
        ("<think>no", "other"),
        ("[LMMS_EVAL_REQUEST_FAILED after 5 retries] no", "other"),
        ("I'm sorry, I can't assist with that.", "other"),
        ("I cannot see a dog", "yes"),  # no refusal; the official rule
    ],
)
def test_pope_reads_by_the_official_rule(reply, answer):
    assert pope.parse_answer(reply) == answer


def test_pope_figures():
    pairs = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("yes", "no")]
    records = [
        {"prediction": said, "answer": truth, "category": "random" if i < 3 else "popular"}
        for i, (said, truth) in enumerate(pairs)
    ]
    score = pope.score(records)
    # TP 2, FP 2, FN 1, TN 1
    assert score["accuracy"] == 50.0 and score["precision"] == 50.0
    assert score["recall"] == pytest.approx(200 / 3) and score["f1"] == pytest.approx(400 / 7)
    assert score["yes_ratio"] == pytest.approx(400 / 6) and score["gold_yes_ratio"] == 50.0
    assert score["random/f1"] == 80.0 and score["popular/f1"] == 0.0 and score["mean_f1"] == 40.0


def test_ten_failed_requests_are_no_half():
    failed = pope.parse_answer("[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.")
    records = [{"prediction": failed, "answer": a, "category": "random"} for a in ["yes"] * 5 + ["no"] * 5]
    score = pope.score(records)
    assert score["accuracy"] == score["f1"] == score["yes_ratio"] == 0.0 and score["unparsed"] == 10


def test_what_is_no_answer_is_counted_by_its_reason():
    said = [
        "yes",
        "",
        "<think>hm",
        "[LMMS_EVAL_REQUEST_FAILED after 5] x",
        "I'm unable to answer this.",
        (1.0, True, 2),
    ]
    assert replies.count_fates(said) == {"failed_requests": 1, "empty_replies": 2, "refusals": 1}
    for refusal in ("Sorry, I can't help with images of people yet.", "As an AI model, I cannot identify people."):
        assert replies.fate(refusal) == "refused"
    for answer in (
        "I can't see any dog",
        "Sorry, no.",
        "Unfortunately, B is wrong; A",
        "I cannot tell them apart: yes",
    ):
        assert replies.fate(answer) in ("answered", "refused")
    for answer in (
        "I cannot identify any dog, so no.",
        "I can't determine it; my best guess is B.",
        "I can't say. No.",
    ):
        assert replies.fate(answer) == "answered"
    assert replies.fate("I'm sorry, but I can't help with that, but A man is in it") == "refused"
    assert replies.fate("I can't see any dog") == replies.fate("Sorry, no.") == "answered"


REFUSALS = """
I won't answer that.
I won't do this.
I won't be able to help with this request.
I will not speculate about people.
I'm unable to view images.
I'm unable to see the image you are referring to.
I'm unable to assist with that.
I am unable to see images, so I can't answer.
I’m currently unable to process images.
I am not able to analyze images directly.
Unfortunately, I'm unable to directly view the picture.
There is no image provided.
There is no image attached to your message.
No image was provided.
No picture has been uploaded, please share it.
It seems that there is no image provided. Please upload the image.
It looks like no image was attached.
The image is not provided.
The image did not load.
You haven't provided an image.
You have not uploaded any image yet.
Please provide the image.
Please upload an image so that I can help.
I don't see an image attached.
I don't see any image in your message.
I don't have access to the image.
I do not have the ability to see images.
As an AI language model, I don't have the ability to view images.
As an AI language model, I cannot see images.
I'm sorry, but as a text-based AI, I can't view pictures.
I must decline.
I'd rather not say.
I prefer not to answer.
I'm not allowed to identify people.
I refuse to answer.
抱歉，我无法回答这个问题。
对不起，我不能提供帮助。
很抱歉，我无法识别图片中的人物。
作为一个AI语言模型，我无法查看图片。
我无法看到图片。
我无法看到您提供的图片。
對不起，我無法協助。
您没有提供图片。
图片未提供。
申し訳ありませんが、お答えできません。
申し訳ございませんが、その質問にはお答えすることができません。
すみません、画像を見ることができません。
画像が提供されていません。
申し訳ありませんが、人物を特定することはできません。
"""
ANSWERS = """
I cannot see a dog
There is no image of a dog.
There is no dog in the image.
There is no picture on the wall.
No, there is no image on the wall.
No image of a cat is visible in the corner.
I won't lie: B
I won't say much, the answer is C.
I'm unable to see the image clearly, but the answer is B.
There is no image provided, so B.
抱歉，我无法确定，但答案是B。
我无法确定。答案：C
抱歉，我无法识别，选B
It cannot be determined
The image is not clear
No
Yes
不能
没有
无法看到狗
我看到一只狗，不能飞
这个人不能回答
不，图片中没有狗
画像には犬がいません
犬は見えません
I don't see any image of a dog
I don't see a picture on the wall
I don't see the dog
The picture is not visible in the mirror because it is dark
I can't find one
Sorry, no.
Please
申し訳ありません。答えはBです
You have not seen it
A
B. I won't
I would rather have the dog
"""


def test_refusals_and_what_looks_like_one():
    for reply in REFUSALS.strip().splitlines():
        assert replies.fate(reply) == "refused", reply
        assert parse_choice(f"{reply} The answer is B.", {"A": "dog", "B": "cat"}) == "B", reply
    for reply in ANSWERS.strip().splitlines():
        assert replies.fate(reply) == "answered", reply
    # long replies of anything are read at once
    assert replies.fate("!" * 100_000) == replies.fate("As an " + "a " * 50_000) == "answered"


def test_mmbench_counts_a_question_only_if_every_turn_is_right():
    def record(index, prediction, answer="A"):
        levels = {"category": "animals", "l2-category": None if index == 9 else f"level {index % 10 - 6}"}
        return {"index": index, "prediction": prediction, "answer": answer, "num_options": 2, **levels}

    records = [
        record(7, "A"),
        record(1_000_007, "B", "B"),
        record(8, "A"),
        record(1_000_008, "A", "B"),
        record(9, "C"),
    ]
    score = mmbench.score(records)
    assert score["circular_accuracy"] == pytest.approx(100 / 3) and score["questions"] == 3
    assert score["vanilla_accuracy"] == pytest.approx(200 / 3) and score["incomplete_questions"] == 1
    assert score["category/animals"] == score["circular_accuracy"]
    levels = {name: value for name, value in score.items() if name.startswith("l2")}
    assert levels == {"l2-category/level 1": 100.0, "l2-category/level 2": 0.0}
    assert mmbench.score([record(7, "A", None)]) == {"questions": 1}


def test_mmbench_submission_has_the_words_of_the_model():
    row = {"index": 7, "question": "q", "A": "dog", "prediction": "a\x01 dog", "l2-category": "perception"}
    (line,) = mmbench.submission_rows([{"row": row, "prediction": "A"}])
    assert line["prediction"] == "a dog" and line["index"] == 7 and line["B"] is None


def test_mmbench_options_that_are_missing_are_no_options():
    assert mmbench.options_of({"A": "x", "B": None, "C": float("nan"), "D": "nan", "E": ""}) == {"A": "x"}


def test_scienceqa_by_image_subject_and_grade():
    def record(prediction, answer, has_image, subject, grade):
        return {
            "prediction": prediction,
            "answer": answer,
            "has_image": has_image,
            "subject": subject,
            "grade": grade,
            "has_text": {"grade2": True, "grade12": False}.get(grade),
        }

    score = scienceqa.score(
        [
            record("A", "A", True, "natural science", "grade2"),
            record("B", "A", True, "natural science", "grade8"),
            record("other", "C", False, "language science", "grade12"),
            record("E", "E", False, "language science", None),
        ]
    )
    assert (score["accuracy"], score["image_accuracy"], score["unparsed"]) == (50.0, 50.0, 1)
    assert score["context/text"] == 100.0 and score["context/none"] == 0.0
    assert score["subject/language science"] == 50.0 and score["grade/1-6"] == 100.0 and score["grade/7-12"] == 0.0
    assert scienceqa.parse_answer("The answer is E", ["a1", "a2", "a3", "a4", "a5"]) == "E"


def test_seedbench_takes_the_smallest_loss():
    assert seedbench.rank([2.0, 1.0, 3.0, 1.0]) == "B"
    records = [
        {"prediction": "B", "answer": "B", "question_type": 1},
        {"prediction": "C", "answer": "B", "question_type": 2, "data_type": "video"},
    ]
    assert seedbench.score(records) == {
        "accuracy": 50.0,
        "questions": 2,
        "question_type/1": 100.0,
        "question_type/2": 0.0,
        "data_type/video": 0.0,
    }


@pytest.mark.parametrize(
    ("reply", "grade"), [("0.5", 0.5), ("1.0 because", 1.0), (" 0", 0.0), ("1.5", None), ("yes", None), ("", None)]
)
def test_mmvet_reads_the_first_word_as_a_grade(reply, grade):
    assert mmvet.parse_grade(reply) == grade


def test_mmvet_averages_over_rows_runs_and_capabilities():
    records = [
        {"capabilities": ["rec", "math"], "grades": [1.0, 0.0]},
        {"capabilities": ["rec"], "grades": [0.5, None]},
    ]
    score = mmvet.score(records)
    # runs: 75 and 0
    assert score["total"] == 37.5 and score["total_std"] == 37.5 and score["judge_failures"] == 1
    assert score["capability/rec"] == 37.5 and score["capability/math"] == 50.0
    assert score["capabilities/rec"] == 25.0 and score["capabilities/math_rec"] == 50.0


def test_mmvet_prompt_is_its_own_code_s():
    assert mmvet.grading_prompt("T\n", "q", "2<AND>3", "<think>x</think>r") == "T\n\nq | 2 <AND> 3 | r | "
    assert mmvet.parse_grade("<think>0.1?</think>0.5 or so") == 0.5


def test_magnifierbench_asks_its_judge_what_2023_asked():
    system, user = magnifierbench.judge_messages("What is it?", "<think>cat</think>A dog", "dog")
    assert system["content"] == (
        "You are a helpful AI assistant. Your task is to judge whether the model response is correct to answer the "
        "given question or not."
    )
    assert user["content"] == (
        "Question: What is it?\nModel Response: A dog\nGround Truth: dog\nWill the model response be considered "
        "correct? You should only answer yes or no."
    )


CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": ["long", "short"], "precision": None}
NUMBER = {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": 1.0}
WHOLE = {**NUMBER, "answer_type": "integer", "precision": None}


@pytest.mark.parametrize(
    ("extraction", "row", "expected"),
    [
        ("(B) short", CHOICE, "short"),
        ("A", CHOICE, "long"),
        ("shor", CHOICE, "short"),
        ("1.249", NUMBER, "1.2"),
        ("3.0", WHOLE, "3"),
        ("three", WHOLE, None),
        ("inf", WHOLE, None),
        ("[1, 2]", {**NUMBER, "answer_type": "list"}, "[1, 2]"),
    ],
)
def test_mathvista_normalises(extraction, row, expected):
    assert mathvista.normalise(extraction, row) == expected


def test_mathvista_extracts_what_needs_no_judge():
    assert mathvista.extract_directly("short", CHOICE) == "short"
    assert mathvista.extract_directly("2", WHOLE) == "2" and mathvista.extract_directly("1.5", NUMBER) == "1.5"
    assert mathvista.extract_directly("about 2", WHOLE) is None
    for reply in ("B", "(B)", "b.", "(B) short", "short.", "<think>A?</think>B"):
        assert mathvista.extract_directly(reply, CHOICE) == "short"
    assert mathvista.extract_directly("B, as it ends early", CHOICE) is None  # the judge's to read
    assert mathvista.choice_in_prose("B, as it ends early", CHOICE) == "short"
    for reply in ("3.", "3.0", "3", " 3 "):
        assert mathvista.extract_directly(reply, WHOLE) == "3"
    assert mathvista.extract_directly("1,234", WHOLE) == "1234"
    assert mathvista.extract_directly("3.7", WHOLE) is None
    assert mathvista.extract_directly('The answer is "2".', WHOLE, quick=True) == "2"


def test_mathvista_query_and_scores():
    row = {**CHOICE, "question": "Which?", "unit": "cm"}
    hint = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    lines = ["Question: Which? (Unit: cm)", "Choices:", "(A) long", "(B) short"]
    # as query.json of the data has it; build_query.py has another order
    assert mathvista.build_query(row) == "\n".join([hint, *lines])
    assert mathvista.build_query(row, "solution") == "\n".join([*lines, hint, "Solution:"])
    assert mathvista.build_query({**row, "query": "as published\n"}) == "as published\n"
    with pytest.raises(ValueError, match="shot_type must be solution"):
        mathvista.build_query(row, "code")
    with pytest.raises(ValueError, match="answer_type 'date'"):
        mathvista.build_query({**NUMBER, "answer_type": "date", "question": "When?"})
    records = [
        {"prediction": "short", "answer": "short", "failed": False, "kinds": {"task": "t", "skills": ["a", "b"]}},
        {"prediction": None, "answer": "2", "failed": True, "kinds": {"task": "t", "skills": ["a"]}},
    ]
    assert mathvista.score(records) == {
        "accuracy": 50.0,
        "extraction_failures": 1,
        "questions": 2,
        "task/t": 50.0,
        "skills/a": 50.0,
        "skills/b": 100.0,
    }
    hidden = [{**record, "answer": ""} for record in records]  # the test split
    assert mathvista.score(hidden) == {"extraction_failures": 1, "questions": 2}


def test_the_right_answer_is_an_option_however_it_is_written():
    rows = {
        "otter_magnifierbench": benchmark_rows.magnifierbench()[0],
        "otter_mmbench": benchmark_rows.mmbench()[0],
        "otter_seedbench_ppl": benchmark_rows.seedbench()[0],
    }
    replies = [(-1.0, True, 2)] * 4
    for name, row in rows.items():
        record = BENCHMARKS[name].record
        said = replies if "ppl" in name else ["B"]
        assert record({**row, "answer": " b "}, said, Options())["answer"] == "B"
        with pytest.raises(ValueError, match="has the answer 'E', none of A, B, C, D"):
            record({**row, "answer": "E"}, said, Options())
    with pytest.raises(ValueError, match="has the answer 3, counted from 0, of 3 choices"):
        scienceqa_answer({**benchmark_rows.scienceqa()[0], "answer": 3})
