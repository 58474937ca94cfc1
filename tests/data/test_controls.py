"""Controls: other pictures for the same questions, and what the right ones are worth."""

from types import SimpleNamespace

import pytest
from PIL import Image

from otter_hf.data.controls import blank, control_messages, media_of, swap, visual_gain


def picture(number):
    return Image.new("RGB", (8 + number, 6), (number, 0, 0))


def conversation(number, *pictures):
    example = [
        {"role": "user", "content": [{"type": "image", "image": picture(99)}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "it"},
    ]
    media = [{"type": "image", "image": one} for one in pictures]
    return [*example, {"role": "user", "content": [*media, {"type": "text", "text": f"question {number}"}]}]


def test_each_row_gets_the_picture_of_another():
    own = [picture(i) for i in range(7)]
    other = [swap([own[i]], i, 7, lambda row: [own[row]])[0] for i in range(7)]
    assert sorted(p.width for p in other) == sorted(p.width for p in own)
    assert all(mine is not theirs for mine, theirs in zip(own, other, strict=True))
    again = [swap([own[i]], i, 7, lambda row: [own[row]], seed=1)[0] for i in range(7)]
    assert other == [swap([own[i]], i, 7, lambda row: [own[row]])[0] for i in range(7)] != again


def test_the_same_picture_of_another_row_is_none(monkeypatch):
    # three questions about each of two pictures, and a row without
    rows = [[picture(i // 3)] for i in range(6)] + [[]]
    for i in range(6):
        (other,) = swap(rows[i], i, 7, rows.__getitem__)
        assert other.width != rows[i][0].width
    # as many as there were; nothing else is there
    assert [p.width for p in swap([picture(5), picture(6)], 6, 7, rows.__getitem__)] in ([8, 8], [9, 9])
    told = []
    monkeypatch.setattr("otter_hf.data.controls.logger", SimpleNamespace(warning_once=told.append))
    assert swap([], 0, 3, lambda row: []) == [] and not told
    assert swap([picture(0)], 0, 3, lambda row: [picture(0)])[0].width == 8
    assert swap([picture(0)], 0, 1, lambda row: [picture(1)])[0].width == 8
    assert len(told) == 2 and "takes rows with different pictures" in told[0]


@pytest.mark.parametrize("control", ["swapped", "blank"])
def test_only_the_media_of_the_question_change(control):
    conversations = [conversation(0, picture(0), picture(1)), conversation(1, picture(2))]
    given = control_messages(control, conversations[0], 0, 2, conversations.__getitem__)
    assert given[:2] == conversations[0][:2]
    assert given[2]["content"][2] == {"type": "text", "text": "question 0"}
    media = [part["image"] for part in media_of(given)]
    if control == "swapped":
        assert [p.width for p in media] == [10, 10]
    else:
        assert [(p.size, p.getcolors()[0][1]) for p in media] == [((8, 6), (127,) * 3), ((9, 6), (127,) * 3)]
    # without pictures it stays
    text = [{"role": "user", "content": "who?"}]
    assert control_messages(control, text, 0, 2, conversations.__getitem__) is text


def test_films_become_grey_frame_by_frame():
    assert [frame.size for frame in blank([picture(0), picture(1)])] == [(8, 6), (9, 6)]
    assert len(blank("film.mp4")) == 1


def accuracy(answers):
    return 100 * sum(answers) / len(answers)


def test_the_gain_has_an_interval_of_paired_answers():
    right = [True] * 70 + [False] * 30
    assert visual_gain(accuracy, right, right) == {"visual_gain": 0.0, "interval": [0.0, 0.0]}
    # 20 of 100 are right with the right picture only
    swapped = [False] * 20 + right[20:]
    told = visual_gain(accuracy, right, swapped)
    assert told == visual_gain(accuracy, right, swapped)
    low, high = told["interval"]
    assert told["visual_gain"] == pytest.approx(20.0)
    # normal approximation of a paired difference: 20 +- 1.96 * sqrt(100 * 0.2 * 0.8)
    assert low == pytest.approx(12.2, abs=1.5) and high == pytest.approx(27.8, abs=1.5)
