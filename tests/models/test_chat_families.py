"""What a user of any family relies on in messages, prompts and generation: Otter, Flamingo and OtterHD alike."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as DatasetImage
from PIL import Image
from transformers import AutoProcessor, DynamicCache, ImageTextToTextPipeline

from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor, OtterProcessor
from otter_hf.data.collator import OtterCollator
from otter_hf.data.collator_otterhd import OtterHDCollator
from otter_hf.prompts import chat_template
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


RED, BLUE = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
IMAGE = {"otter": "<image>", "flamingo": "<image>", "otterhd": "|SPEAKER|"}

OLD_TEMPLATE = """
{%- for message in messages -%}
    {{- 'User:' if message['role'] == 'user' else ' Assistant:\x04 ' -}}
    {%- for part in message['content'] if part['type'] == 'text' -%}
        {{- part['text'] -}}
    {%- endfor -%}
{%- endfor -%}
{{- ' Assistant:\x04' -}}
"""


def make(name):
    if name == "otterhd":
        processor = otterhd_tiny.tiny_processor()
        return processor, otterhd_tiny.tiny_model(processor)
    if name == "flamingo":
        processor = otter_tiny.tiny_processor(FlamingoProcessor)
        processor.chat_template = chat_template("plain")
        return processor, otter_tiny.tiny_model(processor, FlamingoForConditionalGeneration)
    processor = otter_tiny.tiny_processor()
    return processor, otter_tiny.tiny_model(processor)


@pytest.fixture(scope="module", params=IMAGE)
def family(request):
    return request.param, *make(request.param)


def user(*parts):
    kinds = {str: "text", Image.Image: "image", list: "video"}
    parts = [part if isinstance(part, dict) else {"type": (k := kinds[type(part)]), k: part} for part in parts]
    return {"role": "user", "content": parts}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def inputs_of(processor, messages, add_generation_prompt=True, **options):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def greedy(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


def test_pictures_stand_where_a_message_puts_them(family):
    name, processor, _ = family
    batch = inputs_of(processor, [user("one", RED, "two", BLUE, "three"), assistant("a"), user(RED, "four")])
    text = processor.decode(batch["input_ids"][0]).replace("|NEWLINE|", "").replace(" ", "")
    while IMAGE[name] * 2 in text:  # OtterHD has a token for each patch
        text = text.replace(IMAGE[name] * 2, IMAGE[name])
    places = [text.index(word) for word in ("one", "two", "three", "four")]
    assert places == sorted(places)
    assert [text[start:end].count(IMAGE[name]) for start, end in zip(places, [*places[1:], None], strict=True)] == [
        1,
        1,
        1,
        0,
    ]
    first = inputs_of(processor, [user(RED, "one", BLUE)])["pixel_values"]
    other = inputs_of(processor, [user(BLUE, "one", RED)])["pixel_values"]
    assert not torch.equal(first, other)


def test_pictures_and_films_keep_their_order():
    for name in ("otter", "flamingo"):
        processor, _ = make(name)
        film = [RED, BLUE]
        mixed = inputs_of(processor, [user(RED, "a", film, "b", BLUE, "c")])["pixel_values"]
        frames = [[RED], film, [BLUE]]
        told = processor(text="<image>a<image>b<image>c", videos=[frames], return_tensors="pt")["pixel_values"]
        assert torch.equal(mixed, told)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([user({"type": "input_text", "text": "a"})], {}, r"messages\[0\].content\[0\] is of the type 'input_text'"),
        ([user({"type": "input_image", "image_url": "a.png"})], {}, "type 'input_image'; use text, image"),
        ([user({"type": "audio", "audio": "a.wav"}, "a")], {}, "type 'audio'"),
        ([user({"type": "image"}, "a")], {}, "type image and has 0 of image, url, path, base64"),
        ([user({"type": "image", "image": None}, "a")], {}, "has 0 of image"),
        ([user({"type": "image", "image": RED, "url": "a.png"})], {}, "has 2 of image"),
        ([user({"type": "text", "text": "a", "image": RED})], {}, "type text and has 'image'"),
        ([user({"type": "text"})], {}, "has no text"),
        ([user("a"), assistant("b") | {"thinking": "c"}], {}, r"messages\[1\] has 'thinking'"),
        ([{"role": "user", "content": ["a"]}], {}, "must be a part"),
        ([], {}, "must be a list of messages"),
        ([[user("a")], []], {}, r"conversation\[1\] must be a list of messages"),
        ([user("a"), [user("a")]], {}, r"messages\[1\] must be a message"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], {}, r"messages\[0\].content must be a text or"),
        ([{"role": "user", "content": 5}], {}, "content must be a text or a list of parts, got 5"),
        ([{"role": "user", "content": None}], {}, "content must be a text or a list of parts, got None"),
        ([user(RED, "a")], {"processor_kwargs": {"images": [BLUE]}}, "brings its image, but images are given beside"),
        ([user({"type": "image", "image": [RED, BLUE]}, "a")], {}, r"images\[0\]\[0\]"),
        ([user("a")], {"processor_kwargs": {"do_sample": False}}, "no option do_sample .*generate_kwargs"),
        ([user("a")], {"processor_kwargs": {"paddin": True}}, "no option paddin .*did you mean padding"),
        ([user("a")], {"processor_kwargs": {"text_kwargs": {"max_lenght": 9}}}, "text_kwargs.max_lenght .*max_length"),
        ([user("a")], {"processor_kwargs": {"is_split_into_words": True}}, "does not support is_split_into_words"),
        ([user(RED, "a")], {"processor_kwargs": {"sampling_rate": 16000}}, "no option sampling_rate"),
    ],
)
def test_what_is_not_understood_is_refused(family, messages, options, message):
    with pytest.raises(ValueError, match=message):
        inputs_of(family[1], messages, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (5, "must be a text or a list of texts, got 5"),
        (RED, "must be a text or a list of texts, got <PIL"),
        (b"a", "must be a text"),
        (["a", None], r"text\[1\] must be a text, got None"),
        ([[1, 2]], r"text\[0\] must be a text"),
        ([], "empty list"),
    ],
)
def test_what_is_no_text_is_refused(family, text, message):
    with pytest.raises(ValueError, match=message):
        family[1](text=text)


def test_texts_come_in_any_iterable_and_padding_is_known(family):
    _, processor, _ = family
    expected = processor(text=["a", "bc"], return_tensors="pt")["input_ids"]
    for texts in (("a", "bc"), iter(["a", "bc"])):
        assert torch.equal(processor(text=texts, return_tensors="pt")["input_ids"], expected)
    with pytest.raises(ValueError, match="longst"):
        processor(text=["a", "bc"], padding="longst")


def test_pictures_beside_the_messages_stand_at_their_places(family):
    _, processor, _ = family
    expected = inputs_of(processor, [user(RED, "a", BLUE)])
    places = [user({"type": "image"}, "a", {"type": "image"})]
    given = inputs_of(processor, places, processor_kwargs={"images": [RED, BLUE]})
    assert all(torch.equal(given[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="videos were given beside the messages"):
        inputs_of(processor, [user("a")], processor_kwargs={"videos": [[RED, BLUE]]})


def test_a_prompt_behind_an_answer_ends_where_the_next_one_begins(family):
    name, processor, _ = family
    ids = inputs_of(processor, [user("a"), assistant("b")])["input_ids"][0]
    last = processor.end_of_chunk_token_id if name == "flamingo" else processor.answer_token_id
    assert ids[-1] == last


def test_tools_are_refused_by_every_template(family):
    _, processor, _ = family
    for template in (None, "{% for message in messages %}{{ message['content'] }}{% endfor %}"):
        with pytest.raises(Exception, match="tools"):
            processor.apply_chat_template([user("a")], chat_template=template, tools=[{"type": "function"}])


def test_templates_of_older_folders_go_on():
    """Those wrote no place for the pictures of an OtterHD, which then stand in front, and marked no answers."""
    processor, _ = make("otterhd")
    messages = [user(RED, BLUE, "a"), assistant("one"), user("b")]
    expected = inputs_of(processor, messages)
    old = {"chat_template": OLD_TEMPLATE}
    assert torch.equal(inputs_of(processor, messages, **old)["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="has 0 of image"):
        inputs_of(processor, [user({"type": "image"}, "a")], **old)


def test_numbers_of_pictures_and_places_are_compared(family):
    name, processor, _ = family
    one, two = IMAGE[name] + "a", IMAGE[name] + "a" + IMAGE[name]
    for text, images in ((one, None), (two, [RED]), (one, [[RED, BLUE]]), ([one, two], [[RED, BLUE], [RED]])):
        with pytest.raises(ValueError, match="image"):
            processor(text=text, images=images)
    if name != "otterhd":  # there pictures without a place stand in front
        with pytest.raises(ValueError, match="0 <image> token"):
            processor(text="a", images=[RED])


def test_pictures_of_other_forms_and_empty_fields_are_taken(family, tmp_path):
    _, processor, _ = family
    RED.save(tmp_path / "red.png")
    path = str(tmp_path / "red.png")
    expected = inputs_of(processor, [user(RED, "a")])
    for part in (
        {"type": "image", "image": RED, "text": None},  # as datasets fills up what a part has not
        {"type": "image", "path": path},
        {"type": "image_url", "image_url": {"url": path, "detail": "auto"}},
    ):
        given = inputs_of(processor, [user(part, "a") | {"tool_calls": None}])
        assert given.keys() == expected.keys() and all(torch.equal(given[key], expected[key]) for key in given)


def test_tokens_of_the_tokenizer_in_user_text_stay_text():
    """Those of the language models of today, in chats as in training."""
    tokenizer = otter_tiny.byte_tokenizer(eos_token="<|im_end|>")
    # Mistral's has as many
    others = [f"[control_{number}]" for number in range(800)]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|vision_start|>", *others]})
    processor = OtterProcessor(make("otter")[0].image_processor, OtterProcessor.prepare_tokenizer(tokenizer))
    special = ["<|im_end|>", "<|im_start|>", "<|vision_start|>"]
    words = "</s>".join(special)
    ids = inputs_of(processor, [user(words)])["input_ids"][0]
    assert not torch.isin(ids, torch.tensor(processor.tokenizer.convert_tokens_to_ids(special))).any()
    sample = {"id": "s", "turns": [(words, "e")], "media": [], "media_per_turn": [0], "media_places": [[]]}
    trained = OtterCollator(processor, format="spaced")([sample])["input_ids"][0]
    assert torch.equal(trained[: len(ids)], ids)


def test_several_pictures_come_in_anything_that_is_a_list(family, tmp_path):
    name, processor, _ = family
    texts = [IMAGE[name] + "a", IMAGE[name] + "b"]
    expected = processor(text=texts, images=[RED, BLUE], return_tensors="pt")
    objects = np.empty(2, dtype=object)
    objects[:] = [RED, BLUE]
    column = Dataset.from_dict({"image": [RED, BLUE]}, Features({"image": DatasetImage()}))["image"]
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, picture in zip(names, (RED, BLUE), strict=True):
        picture.save(path)
    of_names = (np.array(names), pd.Series(names, index=[7, 8]))
    for images in (objects, pd.Series([RED, BLUE]), column, ((RED,), (BLUE,)), *of_names):
        batch = processor(text=texts, images=images, return_tensors="pt")
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_answers_are_marked(family):
    name, processor, _ = family
    messages = [user(RED, "q"), assistant("one"), user("r", BLUE), assistant("two")]
    batch = inputs_of(
        processor,
        [messages, messages[:2]],
        add_generation_prompt=False,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    marked = [processor.decode(row[mask.bool()]) for row, mask in zip(*batch_masks(batch), strict=True)]
    end = {"otter": "<|endofchunk|>", "flamingo": "<|endofchunk|>", "otterhd": ""}[name]
    last = "|ENDOFTEXT|" if name == "otterhd" else ""
    assert [text.replace(" ", "") for text in marked] == [f"one{end}two{end}{last}", f"one{end}{last}"]


def batch_masks(batch):
    return batch["input_ids"], batch["assistant_masks"]


@pytest.mark.parametrize("name", ["otter", "otterhd"])
def test_marks_are_the_labels_of_training(name):
    processor, _ = make(name)
    collate = OtterHDCollator(processor) if name == "otterhd" else OtterCollator(processor, format="spaced")
    sample = {"id": "s", "turns": [("q", "one"), ("rs", "two")], "media": [[RED], [BLUE]], "media_per_turn": [1, 1]}
    trained = collate([{**sample, "media_places": [[0], [1]]}])
    messages = [user(RED, "q"), assistant("one"), user("r", BLUE, "s"), assistant("two")]
    batch = inputs_of(processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
    ids, masks = batch_masks(batch)
    length = ids.shape[1]
    assert torch.equal(trained["input_ids"][:, :length], ids)  # Otter's </s> comes behind the template's text
    assert torch.equal(trained["labels"][:, :length] != -100, masks.bool())


def test_prompts_are_not_cut_before_their_answer(family):
    name, processor, _ = family
    place, images = IMAGE[name], [RED]
    reply = {"otter": " GPT:<answer>", "flamingo": "", "otterhd": " Assistant:\x04"}[name]
    full = len(processor(text=f"{place}ab{reply}", images=images)["input_ids"][0])
    cut = {"truncation": True, "max_length": full - 1}
    if reply:
        with pytest.raises(ValueError, match="cut"):
            processor(text=f"{place}ab{reply}", images=images, **cut)
        # what stands behind the answer's beginning may go
        shorter = processor(text=f"{place}ab{reply}cd", images=images, truncation=True, max_length=full)
        assert len(shorter["input_ids"][0]) == full
    with pytest.raises(ValueError, match="cut|more than max_length"):
        processor(text=f"ab{place}", images=images, truncation=True, max_length=2)
    whole = processor(text=f"{place}ab{reply}", images=images, truncation=True, max_length=full)
    assert len(whole["input_ids"][0]) == full


def test_the_tokens_of_pictures_are_told(family):
    name, processor, _ = family
    batch = processor(
        text=[f"{IMAGE[name]}a", "abc"], images=[[RED], []], return_mm_token_type_ids=True, return_tensors="pt"
    )
    told = batch["mm_token_type_ids"].bool()
    is_picture = torch.isin(batch["input_ids"], torch.tensor(processor.image_token_ids))
    assert torch.equal(told, is_picture) and told[0].any() and not told[1].any()


def test_options_that_are_none_are_not_given(family):
    name, processor, _ = family
    expected = processor(text=f"{IMAGE[name]}a", images=[RED])
    assert processor(text=f"{IMAGE[name]}a", images=[RED], fps=None, audio=None, tools=None).keys() == expected.keys()


def test_the_side_of_padding_may_be_given(family, tmp_path):
    _, processor, _ = family
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.padding_side == "left"
    right = AutoProcessor.from_pretrained(tmp_path, padding_side="right")
    assert not right(text=["a", "abc"], return_tensors="pt")["attention_mask"][0, -1]


def test_lengths_are_padded_to_a_multiple(family):
    _, processor, _ = family
    messages = [[user(RED, "a")], [user(BLUE, "a longer one")]]
    batch = inputs_of(processor, messages, processor_kwargs={"padding": True, "pad_to_multiple_of": 16})
    assert batch["input_ids"].shape[1] % 16 == 0 and not batch["attention_mask"][:, 0].any()
    assert batch["attention_mask"][:, -1].all()


def test_pipeline_in_batches_answers_as_one_by_one(family):
    _, processor, model = family
    pipeline = ImageTextToTextPipeline(model=model, processor=processor, device="cpu")
    chats = [[user(RED, "a")], [user(BLUE, "what is it then, if I may ask?")]]
    options = {"generate_kwargs": {"max_new_tokens": 5, "do_sample": False}, "return_full_text": False}
    single, batched = (
        [answer[0]["generated_text"] for answer in pipeline(chats, batch_size=size, **options)] for size in (1, 2)
    )
    assert single == batched and len(set(single)) == 2


def test_an_assistant_changes_nothing(family):
    _, processor, model = family
    inputs = inputs_of(processor, [user(RED, "a", BLUE, "b")])
    assert torch.equal(greedy(model, inputs, assistant_model=model), greedy(model, inputs))


def test_a_second_turn_goes_on_with_the_cache(family):
    _, processor, model = family
    first = inputs_of(processor, [user(RED, "what?")])
    cache = DynamicCache(config=model.config.get_text_config())
    told = greedy(model, first, past_key_values=cache)
    for image, given in ((None, "all"), (BLUE, "all"), (BLUE, "new")):
        second = inputs_of(processor, [user(*([] if image is None else [image]), "why?")])
        add = second["input_ids"][:, 1 if processor.tokenizer.bos_token_id == second["input_ids"][0, 0] else 0 :]
        ids = torch.cat([told, add], dim=1)
        pictures, new = first["pixel_values"], second.get("pixel_values")
        whole = pictures if new is None else torch.cat([pictures, new], dim=1 if pictures.ndim > 2 else 0)
        expected = greedy(model, {"input_ids": ids, "pixel_values": whole})
        cache.crop(first["input_ids"].shape[1] - cache.get_seq_length())
        pixel_values = whole if given == "all" else new
        assert torch.equal(
            greedy(model, {"input_ids": ids, "pixel_values": pixel_values}, past_key_values=cache), expected
        )


def test_the_last_answer_is_read(family):
    name, processor, _ = family
    messages = [user(RED, "q"), assistant("one"), user(BLUE, "r"), assistant("two")]
    ids = inputs_of(processor, messages, add_generation_prompt=False)["input_ids"]
    # a Flamingo marks no answer: all behind the last picture is read
    for given in (ids, ids[0], ids[0].tolist(), ids.numpy()):
        assert processor.post_process_image_text_to_text(given) == ["rtwo" if name == "flamingo" else "two"]
    assert processor.post_process_image_text_to_text(torch.empty(0, 3, dtype=torch.int64)) == []


def test_tokens_that_do_not_exist_are_not_generated(family):
    name, processor, model = family
    inputs = inputs_of(processor, [user(RED, "a")])
    usual = greedy(model, inputs)[0, inputs["input_ids"].shape[1] :]
    size = int(usual.max())
    model.config.tokenizer_vocab_size = size
    try:
        new = greedy(model, inputs)[0, inputs["input_ids"].shape[1] :]
        assert new.max() < size and model.config.image_token_id not in new
        bias = {(model.config.image_token_id,): 1000.0, (0,): 500.0}
        forced = greedy(model, inputs, sequence_bias=bias)[0, inputs["input_ids"].shape[1] :]
        assert forced.tolist() == [0] * len(forced)
    finally:
        model.config.tokenizer_vocab_size = None
