"""Letters by forms: what a reply names does not depend on which letter it is."""

import pytest

from otter_hf.evaluation.scoring.choices import parse_choice


FORMS = [
    *("{X}", "({X})", "{X}.", "{X})", "{X}:", "[{X}]", "**{X}**", '"{X}"', "`{X}`", "{X}!", "# {X}", "{X}</s>"),
    *("{X}. {t}", "({X}) {t}", "{X}) {t}", "{X}: {t}", "{X} {t}", "{X} - {t}", "{X}\n{t}", "{X}.{t}", "**{X}.** {t}"),
    *("{X}, because the picture shows it", "{X} because it can be seen", "{X}. Because it is there", "{X}; it fits"),
    *("{X}, the {t} is in the middle", "{X} as the picture shows", "{X} The picture shows it", "{X} is correct"),
    *("The answer is {X}", "The answer is ({X}).", "The answer is {X} because it fits.", "Answer: **{X}**"),
    *("The correct answer is **{X}**.", "The answer is option {X}.", "Final answer: {X}", "So the answer is {X}. {t}"),
    *("Option {X}", "Option {X} is correct.", "Choice {X}: {t}", "I choose {X}.", "I would choose {X}", "It is {X}."),
    *("{x}", "({x})", "{x})", "{x}.", "{x}. {t}", "({x}) {t}", "answer: {x}", "I think it is ({x})."),
    *("\\boxed{{{X}}}", "The answer is \\boxed{{{X}}}.", "$\\boxed{{\\text{{{X}}}}}$", "Let us see.\n\n{X}"),
    *(
        "<think>A or B? The answer is D</think>{X}",
        "It must be D.</think>\n{X}",
        "<think>hm</think><answer>{X}</answer>",
    ),
    *(
        "{X} best describes the picture",
        "{X} makes sense",
        "{X} most likely",
        "{X} only",
        "{X} it's in it",
        "{X} clearly shows it",
    ),
    *("答案是{X}，因为图中有。", "选择{X}，因为图中有。", "正确答案是：{X}。"),
    *("{t}", "The {t}.", "It is a {t}.", "{X}, not {Y}", "{X} ... not a thing ({Y})", "{X}\n\nThe picture shows it."),
]
QUESTIONS = [
    dict(zip("ABCD", ("dog", "cat", "bird", "fish"), strict=True)),
    dict(zip("ABCD", ("1", "2", "3", "15"), strict=True)),
    dict(zip("ABCDE", ("0.5", "1.5", "5", "15", "1"), strict=True)),
    dict(zip("ABCD", ("DC", "AC", "BC", "AD"), strict=True)),
    dict(zip("ABCD", ("red car", "red", "car", "blue car"), strict=True)),
    dict(zip("ABCD", ("A man", "Two cats", "Plan B", "C major"), strict=True)),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_letter_is_read_in_every_form(form):
    for options in QUESTIONS:
        others = dict(zip(options, [*list(options)[1:], "A"], strict=True))
        for letter, text in options.items():
            reply = form.format(X=letter, x=letter.lower(), t=text, Y=others[letter])
            assert parse_choice(reply, options) == letter, (reply, options)


ANIMALS = {"A": "dog", "B": "cat", "C": "black cat", "D": "blue"}


@pytest.mark.parametrize(
    ("reply", "options", "letter"),
    [
        # texts that look like letters or numbers
        ("AC", {"A": "DC", "B": "AC"}, "B"),
        ("the answer is ac", {"A": "DC", "B": "AC"}, "B"),
        ("It is vitamin C.", {"A": "Vitamin C", "B": "iron", "C": "zinc"}, "A"),
        ("b", {"A": "b", "B": "a"}, "A"),
        ("B", {"A": "B", "B": "A"}, "B"),
        ("1.5", {"A": "1", "B": "2"}, "other"),
        ("15", {"A": "1", "B": "5"}, "other"),
        ("1,000", {"A": "1", "B": "1,000"}, "B"),
        ("A most unusual picture", ANIMALS, "other"),
        ("A best guess would be something blue", ANIMALS, "D"),
        ("-1", {"A": "1", "B": "2"}, "other"),
        ("3-1", {"A": "1", "B": "2"}, "A"),
        # texts without their article, denied, in Chinese; wide letters
        ("Red dog", {"A": "a red dog", "B": "a cat"}, "A"),
        ("There is a black cat.", {"A": "the dog", "B": "the black cat"}, "B"),
        ("The answer is 2, not 1.", {"A": "1", "B": "2", "C": "3"}, "B"),
        ("Yes, no doubt about it.", {"A": "Yes", "B": "No"}, "A"),
        ("Yes, no doubt about it.", {"A": "Yes", "B": "No", "C": "Unknown"}, "other"),
        ("图中是黑猫。", {"A": "红狗", "B": "黑猫"}, "B"),
        ("Ｂ", ANIMALS, "B"),
        # articles, pronouns, abbreviations
        ("A man is standing", ANIMALS, "other"),
        ("A cat", ANIMALS, "B"),
        ("A blue thing", ANIMALS, "D"),
        ("Answer: A cat", ANIMALS, "B"),
        ("I see a dog", {"A": "dog", "I": "x"}, "A"),
        ("e.g. a dog", {**ANIMALS, "E": "x"}, "A"),
        ("D.C. is the capital", {"A": "New York", "D": "x"}, "other"),
        ("C-section", {"A": "x", "C": "y"}, "other"),
        # several letters
        ("A and B are both right", ANIMALS, "other"),
        ("A, B", ANIMALS, "other"),
        ("(A)(B)", ANIMALS, "other"),
        ("A\nB\nC\nD", ANIMALS, "other"),
        ("The answer is A or B", ANIMALS, "other"),
        ("It is not A. It is B.", ANIMALS, "B"),
        ("The answer cannot be A, it is B", ANIMALS, "B"),
        ("B, A is wrong because it is small", ANIMALS, "B"),
        ("A is wrong. B is wrong. So the answer is C.", ANIMALS, "C"),
        ("First the answer is B. Wait, the answer is C", ANIMALS, "C"),
        ("正确答案是B。", ANIMALS, "B"),
        # no answers
        ("I'm sorry, but I can't help with that. A", ANIMALS, "other"),
        ("<think>The answer is B", ANIMALS, "other"),
        ("", ANIMALS, "other"),
    ],
)
def test_what_only_looks_like_a_letter_is_none(reply, options, letter):
    assert parse_choice(reply, options) == letter
