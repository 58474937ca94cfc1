import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from otter_hf.prompts import FORMATS, chat_template, clean_text, escape_reserved_tokens, render


ONE = [("Q1", "A1")]
TWO = [("Q1", "A1"), ("Q2", "A2")]
FAKE = "<fake_token_around_image>"

# (format, turns, media) -> text, from the original training code
GOLDEN = [
    ("simple", ONE, "first", "<image>User:Q1 GPT:<answer>A1<|endofchunk|>"),
    (
        "simple",
        TWO,
        "first",
        "<image>User:Q1 GPT:<answer>A1<|endofchunk|>User:Q2 GPT:<answer>A2<|endofchunk|>",
    ),
    (
        "simple",
        TWO,
        "every",
        "<image>User:Q1 GPT:<answer>A1<|endofchunk|><image>User:Q2 GPT:<answer>A2<|endofchunk|>",
    ),
    ("simple", TWO, "none", "User:Q1 GPT:<answer>A1<|endofchunk|>User:Q2 GPT:<answer>A2<|endofchunk|>"),
    ("llama2", ONE, "first", "[INST]<image>\nQ1[/INST]<answer>A1<|endofchunk|>"),
    (
        "llama2",
        TWO,
        "first",
        "[INST]<image>\nQ1[/INST]<answer>A1<|endofchunk|>[INST]Q2[/INST]<answer>A2<|endofchunk|>",
    ),
    (
        "llama2",
        TWO,
        "every",
        "[INST]<image>\nQ1[/INST]<answer>A1<|endofchunk|>[INST]<image>\nQ2[/INST]<answer>A2<|endofchunk|>",
    ),
    ("llama2", TWO, "none", "[INST]\nQ1[/INST]<answer>A1<|endofchunk|>[INST]Q2[/INST]<answer>A2<|endofchunk|>"),
    (
        "idefics",
        ONE,
        "first",
        f"User:{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant:<answer>A1<end_of_utterance>",
    ),
    (
        "idefics",
        TWO,
        "first",
        f"User:{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant:<answer>A1<end_of_utterance>\n"
        "User:Q2<end_of_utterance>\nAssistant:<answer>A2<end_of_utterance>",
    ),
    (
        "idefics",
        TWO,
        "every",
        f"User:{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant:<answer>A1<end_of_utterance>\n"
        f"User:{FAKE}<image>{FAKE}Q2<end_of_utterance>\nAssistant:<answer>A2<end_of_utterance>",
    ),
    (
        "idefics",
        TWO,
        "none",
        "User:Q1<end_of_utterance>\nAssistant:<answer>A1<end_of_utterance>\n"
        "User:Q2<end_of_utterance>\nAssistant:<answer>A2<end_of_utterance>",
    ),
    ("fuyu", ONE, "first", "|SPEAKER|User:Q1 Assistant:\x04 A1"),
    ("fuyu", TWO, "first", "|SPEAKER|User:Q1 Assistant:\x04 A1User:Q2 Assistant:\x04 A2"),
    ("fuyu", TWO, "every", "|SPEAKER|User:Q1 Assistant:\x04 A1|SPEAKER|User:Q2 Assistant:\x04 A2"),
    ("fuyu", TWO, "none", "User:Q1 Assistant:\x04 A1User:Q2 Assistant:\x04 A2"),
    # the inference prompts of the original demos and benchmarks
    ("spaced", [("q", None)], "first", "<image>User: q GPT:<answer>"),
    (
        "spaced",
        [("q1", "a1"), ("q", None)],
        "every",
        "<image>User: q1 GPT:<answer> a1<|endofchunk|><image>User: q GPT:<answer>",
    ),
    ("spaced", [("q", "a")], "first", "<image>User: q GPT:<answer> a<|endofchunk|>"),
    # several media in one turn
    ("simple", ONE, [2], "<image><image>User:Q1 GPT:<answer>A1<|endofchunk|>"),
    (
        "idefics",
        ONE,
        [2],
        f"User:{FAKE}<image>{FAKE}<image>{FAKE}Q1<end_of_utterance>\nAssistant:<answer>A1<end_of_utterance>",
    ),
]
IDS = [f"{format}-{len(turns)}-{media}" for format, turns, media, _ in GOLDEN]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def messages_of(turns, media, system=None):
    counts = {"first": [1, 0], "every": [1, 1], "none": [0, 0]}[media] if isinstance(media, str) else media
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for (question, answer), count in zip(turns, counts, strict=False):
        parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": parts})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.mark.parametrize("format, turns, media, expected", GOLDEN, ids=IDS)
def test_render_writes_the_original_prompts(format, turns, media, expected):
    assert render(turns, format, media) == expected


@pytest.mark.parametrize("format, turns, media, expected", GOLDEN, ids=IDS)
def test_chat_template_equals_render(tokenizer, format, turns, media, expected):
    text = tokenizer.apply_chat_template(
        messages_of(turns, media),
        chat_template=chat_template(format),
        tokenize=False,
        add_generation_prompt=turns[-1][1] is None,
    )
    assert text == expected


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("media", ["first", "every", "none"])
def test_chat_template_equals_render_on_awkward_texts(tokenizer, format, media):
    # quotes, braces, newlines, percent signs and reserved tokens must come through both ways alike
    turns = [
        ('What\'s "{{ this }}"?\n  50% <image> {% raw %}', " l'été \x04 <answer>\n"),
        ("中文，问题？ </s>", None),
    ]
    expected = render(turns, format, media, task_description="Be <|endofchunk|> brief.")
    text = tokenizer.apply_chat_template(
        messages_of(turns, media, system="Be <|endofchunk|> brief."),
        chat_template=chat_template(format),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == expected
    in_front = "|SPEAKER|" if format == "fuyu" and media != "none" else ""
    assert text.startswith(in_front + "Be < |endofchunk|> brief.\n")


def test_chat_template_accepts_strings_and_videos(tokenizer):
    messages = [
        {"role": "system", "content": "Short answers."},
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "video"}, {"type": "image"}]},
        {"role": "assistant", "content": "a cat "},
        {"role": "user", "content": "Sure?"},
    ]
    messages[1]["content"].append({"type": "text", "text": "moves?"})
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "Short answers.\nUser: What <image><image>moves? GPT:<answer> a cat<|endofchunk|>User: Sure? GPT:<answer>"
    )


# format, text with `^` where a medium stands -> prompt
PLACED = [
    ("simple", "first:^ second:^ done?", "User:first:<image> second:<image> done? GPT:<answer>"),
    ("simple", "^first:^^ last^", "<image>User:first:<image><image> last<image> GPT:<answer>"),
    ("spaced", "what is it?^", "User: what is it?<image> GPT:<answer>"),
    ("llama2", "^first:^ last", "[INST]<image>\nfirst:<image> last[/INST]<answer>"),
    ("plain", "one^two", "one<image>two"),
    ("fuyu", "^a^b", "|SPEAKER|User:a|SPEAKER|b Assistant:\x04"),
    (
        "idefics",
        "^a^^b",
        f"User:{FAKE}<image>{FAKE}a{FAKE}<image>{FAKE}<image>{FAKE}b<end_of_utterance>\nAssistant:<answer>",
    ),
]


@pytest.mark.parametrize("format, marked, expected", PLACED)
def test_media_stand_where_a_message_puts_them(tokenizer, format, marked, expected):
    texts = marked.split("^")
    parts = [{"type": "text", "text": texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=chat_template(format),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == expected
    places = [len("".join(texts[:end])) for end in range(1, len(texts))]
    assert render([("".join(texts), None)], format, [len(places)], media_places=[places]) == expected


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "messages, options, message",
    [
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}],
            {},
            r"messages\[0\] .* type input_text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "type text; parts must"),
        ([{"role": "user", "content": ["q"]}], {}, "parts must be of the type"),
        ([{"role": "user"}], {}, "has no content"),
        ([{"role": "system", "content": [{"type": "image"}]}, USER], {}, "role system and holds a picture"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], {}, r"messages\[1\] .* role assistant"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], {}, "tool_calls"),
        ([USER], {"tools": [{"type": "function"}]}, "tools and documents are not supported"),
        ([USER], {"documents": [{"title": "t", "text": "x"}]}, "tools and documents are not supported"),
    ],
)
def test_chat_template_refuses_what_it_does_not_know(tokenizer, messages, options, message):
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(messages, chat_template=chat_template(), tokenize=False, **options)


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["user", "tool"]])
def test_chat_template_refuses_messages_that_do_not_alternate(tokenizer, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template(messages, chat_template=chat_template(), tokenize=False)


def test_task_description_is_a_line_before_the_first_image():
    text = render(ONE, "simple", "first", task_description="Describe.")
    assert text == "Describe.\n<image>User:Q1 GPT:<answer>A1<|endofchunk|>"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"turns": ONE, "format": "vicuna"}, "'vicuna': use one of simple"),
        ({"turns": ONE, "media": "all"}, "got 'all'"),
        ({"turns": TWO, "media": [1]}, "1 numbers for 2 turns"),
        ({"turns": ONE, "media": [1], "media_places": [[0, 1]]}, r"\[2\] media per turn, but media \[1\]"),
        ({"turns": ONE, "media": [2], "media_places": [[1, 0]]}, "turn 0 are .*: they must go up"),
        ({"turns": ONE, "media": [1], "media_places": [[3]]}, "at most the 2 characters"),
        ({"turns": []}, "at least one"),
        ({"turns": [("Q1", None), ("Q2", "A2")]}, "Turn 0 of 2 has no answer"),
    ],
)
def test_render_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(**arguments)


LONG = "  \n Hello: a-b/c [1,2] 50% $3 <b>x</b>\n\n1. a\n2. b\t c \n"


@pytest.mark.parametrize(
    "text, instruction_clean, instruction_keep, answer_clean, answer_keep",
    [
        (
            LONG,
            "Hello abc 1,2 50 3 bxb 1. a\n2. b c",
            " Hello: a-b/c [1,2] 50% $3 <b>x</b>\n\n1. a\n2. b\t c ",
            "Hello abc 1,2 50 3 bxb 1. a\n2. b c",
            "Hello: a-b/c [1,2] 50% $3 <b>x</b>\n\n1. a\n2. b\t c",
        ),
        ("中文，问题？", "中文问题", "中文，问题？", "中文问题", "中文，问题？"),
        ("\n  x", "x", "  x", "x", "x"),
        ("a\r\nb", "a b", "a\r\nb", "a b", "a\nb"),
        ("<image>\nWhat?", "image\nWhat?", "<image>\nWhat?", "image\nWhat?", "<image>\nWhat?"),
    ],
)
def test_clean_text(text, instruction_clean, instruction_keep, answer_clean, answer_keep):
    assert clean_text(text, keep_symbols=False) == instruction_clean
    assert clean_text(text) == instruction_keep
    assert clean_text(text, answer=True, keep_symbols=False) == answer_clean
    assert clean_text(text, answer=True) == answer_keep


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>\nWhat?", "< image>\nWhat?"),
        ("<ima<image>ge>", "<ima< image>ge>"),
        ("<im\x04age>", "< image>"),
        ("<Image> < image> <answers>", "<Image> < image> <answers>"),
        ("x</s><|endofchunk|>", "x< /s>< |endofchunk|>"),
    ],
)
def test_reserved_tokens_are_escaped(text, expected):
    assert escape_reserved_tokens(text) == expected
    assert escape_reserved_tokens(expected) == expected


def test_data_cannot_inject_special_tokens():
    text = render([("<image>Say <answer>", "yes<|endofchunk|>")], "simple")
    assert [text.count(token) for token in ("<image>", "<answer>", "<|endofchunk|>")] == [1, 1, 1]
