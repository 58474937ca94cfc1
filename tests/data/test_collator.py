import copy
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from otter_hf import FlamingoProcessor
from otter_hf.data.collator import OtterCollator, make_labels
from otter_hf.data.collator_flamingo import FlamingoCollator
from otter_hf.data.samples import SampleError
from otter_hf.prompts import chat_template


# ids and labels of the original code where it was right, and the corrected ones where it was not;
# 1 = <answer>, 2 = end of turn, 3 = EOS, 4 = BOS
LABELS = {
    "two turns": ([4, 10, 1, 11, 2, 12, 1, 13, 2, 3], [0, 0, 0, 11, 2, 0, 0, 13, 2, 3]),
    "second answer cut": ([4, 10, 1, 11, 2, 12, 1, 13, 3], [0, 0, 0, 11, 2, 0, 0, 13, 0]),
    "answer cut": ([4, 10, 1, 11, 12, 3], [0, 0, 0, 11, 12, 0]),
    "end of turn in a question": ([4, 10, 2, 12, 1, 13, 2, 3], [0, 0, 0, 0, 0, 13, 2, 3]),
    "idefics": ([4, 10, 2, 1, 11, 2, 12, 2, 1, 13, 2, 3], [0, 0, 0, 0, 11, 2, 0, 0, 0, 13, 2, 3]),
    "bos is eos": ([3, 10, 1, 11, 2, 3], [0, 0, 0, 11, 2, 3]),
    "no answer": ([4, 10, 12, 3], [0, 0, 0, 0]),
}
TOKENS = {"answer_token_id": 1, "end_of_turn_token_id": 2, "eos_token_id": 3}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("case", LABELS)
def test_labels(case, padding):
    ids, expected = LABELS[case]
    expected = [value or -100 for value in expected]
    mask = [1] * len(ids)
    if padding != "none":  # with the end-of-sequence token, which must not become a target
        pad = [3] * 3
        ids = ids + pad if padding == "right" else pad + ids
        mask = mask + [0] * 3 if padding == "right" else [0] * 3 + mask
        expected = expected + [-100] * 3 if padding == "right" else [-100] * 3 + expected
    labels = make_labels(torch.tensor([ids]), torch.tensor([mask]), **TOKENS)
    assert labels.tolist() == [expected]


def test_labels_are_made_row_by_row():
    ids = torch.tensor([[4, 10, 1, 11, 2, 3], [4, 1, 12, 2, 3, 0]])
    labels = make_labels(ids, (ids != 0).long(), **TOKENS)
    assert labels.tolist() == [[-100, -100, -100, 11, 2, 3], [-100, -100, 12, 2, 3, -100]]


def test_labels_refuse_an_answer_inside_an_answer():
    ids = torch.tensor([[4, 10, 1, 11, 12, 1, 13, 2, 3]])
    with pytest.raises(ValueError, match="Row 0 has an <answer> token at position 5"):
        make_labels(ids, torch.ones_like(ids), **TOKENS)


def sample(turns, media=(), media_per_turn=None, id="S1", **keys):
    if media_per_turn is None:
        media_per_turn = [len(media)] + [0] * (len(turns) - 1)
    return {"id": id, "turns": turns, "media": list(media), "media_per_turn": media_per_turn, **keys}


def text_of(processor, ids, mask=None):
    return processor.tokenizer.decode(ids if mask is None else ids[mask.bool()])


def test_batch_holds_text_labels_and_pictures(tiny_processor, by_colour):
    red, blue = [by_colour["red"]], [by_colour["blue"]]
    batch = OtterCollator(tiny_processor)(
        [
            sample([("Colour?", "red"), ("Sure?", "yes")], [red], id="A"),
            sample([("One?", "1"), ("Two?", "2")], [blue, red], media_per_turn=[1, 1], id="B"),
            sample([("Hi", "ho")], id="C"),
            sample([("Moves?", "no")], [[by_colour["green"]] * 3], id="D", task_description="Look."),
        ]
    )
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "pixel_attention_mask"}
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == mask.shape == labels.shape
    assert [text_of(tiny_processor, row, keep) for row, keep in zip(ids, mask, strict=True)] == [
        "<s><image>User:Colour? GPT:<answer>red<|endofchunk|>User:Sure? GPT:<answer>yes<|endofchunk|></s>",
        "<s><image>User:One? GPT:<answer>1<|endofchunk|><image>User:Two? GPT:<answer>2<|endofchunk|></s>",
        "<s>User:Hi GPT:<answer>ho<|endofchunk|></s>",
        "<s>Look.\n<image>User:Moves? GPT:<answer>no<|endofchunk|></s>",
    ]
    assert [text_of(tiny_processor, row, row != -100) for row in labels] == [
        "red<|endofchunk|>yes<|endofchunk|></s>",
        "1<|endofchunk|>2<|endofchunk|></s>",
        "ho<|endofchunk|></s>",
        "no<|endofchunk|></s>",
    ]
    # padding is on the right
    assert (mask.diff(dim=1) <= 0).all()
    pixels = batch["pixel_values"]
    assert pixels.shape[:4] == (4, 2, 3, 3)
    assert batch["pixel_attention_mask"].sum(-1).tolist() == [[1, 0], [1, 1], [0, 0], [3, 0]]
    assert pixels[0, 0, 0, :, 0, 0].tolist() == [1, 0, 0]
    assert pixels[1, :, 0, :, 0, 0].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert pixels[2].abs().sum() == 0
    assert pixels[3, 0, :, :, 0, 0].tolist() == [[0, 1, 0]] * 3


def test_pictures_that_hide_each_other_are_told(tiny_processor, by_colour, monkeypatch):
    """Words see the last picture in front of them alone."""
    told = []
    monkeypatch.setattr("otter_hf.data.collator.logger.warning_once", told.append)
    red, blue, turns = [by_colour["red"]], [by_colour["blue"]], [("Alike?", "no")]
    collate = OtterCollator(tiny_processor)
    collate([sample(turns, [red + blue]), sample(turns, [red, blue], media_places=[[0, 3]])])
    assert not told
    collate([sample(turns, [red, blue])])
    assert "the words behind see the last one alone" in told[0]


def test_other_formats_label_the_same_answers(tiny_processor, by_colour):
    processor = copy.deepcopy(tiny_processor)
    tokens = ["<fake_token_around_image>", "<end_of_utterance>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    two_turns = sample([("Colour?", "red"), ("Sure?", "yes")], [[by_colour["red"]]])
    learned = {}
    for format in ("simple", "spaced", "llama2", "idefics"):
        labels = OtterCollator(processor, format)([two_turns])["labels"][0]
        learned[format] = text_of(processor, labels, labels != -100)
    assert learned == {
        "simple": "red<|endofchunk|>yes<|endofchunk|></s>",
        "spaced": " red<|endofchunk|> yes<|endofchunk|></s>",
        "llama2": "red<|endofchunk|>yes<|endofchunk|></s>",
        "idefics": "red<end_of_utterance>yes<end_of_utterance></s>",
    }


def test_text_only_batch_still_has_pixels(tiny_processor):
    batch = OtterCollator(tiny_processor)([sample([("Hi", "ho")])])
    assert batch["pixel_values"].shape[:3] == (1, 1, 1)
    assert batch["pixel_values"].abs().sum() == 0


# tokens of a row around its answer: <s><image>User:Q GPT:<answer> and </s>
AROUND = 3 + len("User:Q GPT:") + 1


@pytest.mark.parametrize("limit", range(1, 51))
def test_rows_never_exceed_the_limit(tiny_processor, by_colour, limit):
    answer = "answer " * 10 + "."
    collator = OtterCollator(tiny_processor, max_length=limit, on_overlong="truncate")
    samples = [sample([("Q", answer)], [[by_colour["red"]]])]
    if limit <= AROUND:
        with pytest.raises(SampleError, match="too small for what stands in front"):
            collator(samples)
    else:
        batch = collator(samples)
        assert batch["input_ids"].shape[1] == limit
        labels = batch["labels"][0]
        assert text_of(tiny_processor, labels, labels != -100) == answer[: limit - AROUND]


SIX_TURNS = [(f"Q{i}", f"A{i}") for i in range(6)]
TURN = len("User:Q0 GPT:A0") + 2  # tokens of one turn without an image


def test_oldest_turns_are_dropped_first_and_the_image_stays(tiny_processor, by_colour):
    collator = OtterCollator(tiny_processor, max_length=2 + 1 + 2 * TURN)
    batch = collator([sample(SIX_TURNS, [[by_colour["red"]]])])
    assert text_of(tiny_processor, batch["input_ids"][0]) == (
        "<s><image>User:Q4 GPT:<answer>A4<|endofchunk|>User:Q5 GPT:<answer>A5<|endofchunk|></s>"
    )
    assert batch["pixel_values"][0, 0, 0, :, 0, 0].tolist() == [1, 0, 0]


def test_in_context_examples_are_dropped_with_their_images(tiny_processor, by_colour):
    collator = OtterCollator(tiny_processor, max_length=2 + 2 * (TURN + 1))
    media = [[by_colour[name]] for name in ("red", "green", "blue", "red", "green", "blue")]
    batch = collator([sample(SIX_TURNS, media, media_per_turn=[1] * 6)])
    assert text_of(tiny_processor, batch["input_ids"][0]) == (
        "<s><image>User:Q4 GPT:<answer>A4<|endofchunk|><image>User:Q5 GPT:<answer>A5<|endofchunk|></s>"
    )
    assert batch["pixel_values"][0, :, 0, :, 0, 0].tolist() == [[0, 1, 0], [0, 0, 1]]


def test_an_answer_longer_than_the_limit(tiny_processor, by_colour):
    long = sample([("Q", "long " * 50)], [[by_colour["red"]]], id="LONG_7")
    short = sample([("Q", "a")], [[by_colour["blue"]]], id="SHORT")
    with pytest.raises(SampleError, match="'LONG_7' has .* tokens .* max_length=40"):
        OtterCollator(tiny_processor, max_length=40)([short, long])

    batch = OtterCollator(tiny_processor, max_length=40, on_overlong="truncate")([short, long])
    assert batch["input_ids"].shape == (2, 40)
    labels = batch["labels"][1]
    assert text_of(tiny_processor, labels, labels != -100) == ("long " * 50)[: 40 - AROUND]
    assert labels[-1] == -100 and batch["input_ids"][1, -1] == tiny_processor.tokenizer.eos_token_id

    skip = OtterCollator(tiny_processor, max_length=40, on_overlong="skip")
    batch = skip([short, long])
    assert batch["input_ids"].shape[0] == batch["pixel_values"].shape[0] == 1
    with pytest.raises(SampleError, match="longer than max_length=40"):  # a batch is never empty
        skip([long])


@pytest.mark.parametrize("media, placeholders", [(1, [2]), (2, [1]), (0, [1]), (1, [0])])
def test_images_and_placeholders_must_agree(tiny_processor, by_colour, media, placeholders):
    bad = sample([("Q", "A")], [[by_colour["red"]]] * media, media_per_turn=placeholders, id="BAD_3")
    with pytest.raises(SampleError, match=f"'BAD_3' places {placeholders[0]} images .* holds {media}"):
        OtterCollator(tiny_processor)([bad])


def test_samples_must_be_whole(tiny_processor):
    with pytest.raises(SampleError, match="'BAD_4' has a video without frames"):
        OtterCollator(tiny_processor)([sample([("Q", "A")], [[]], id="BAD_4")])
    with pytest.raises(SampleError, match="lacks id, turns, .* set remove_unused_columns=False"):
        OtterCollator(tiny_processor)([{}])


def test_data_cannot_inject_tokens(tiny_processor, by_colour):
    batch = OtterCollator(tiny_processor)(
        [sample([("<image>Q<answer></s>", "A<|endofchunk|>")], [[by_colour["red"]]])]
    )
    ids = batch["input_ids"][0].tolist()
    assert ids.count(tiny_processor.image_token_id) == 1
    assert ids.count(tiny_processor.answer_token_id) == 1
    assert ids.count(tiny_processor.end_of_chunk_token_id) == 1
    assert ids.count(tiny_processor.tokenizer.eos_token_id) == 1


def test_padding_with_eos_is_not_a_target(tiny_processor_padding_with_eos):
    processor = tiny_processor_padding_with_eos
    batch = OtterCollator(processor, pad_to_multiple_of=64)([sample([("Q", "A")]), sample([("Q", "AAAA")])])
    assert batch["input_ids"].shape == (2, 64)
    assert (batch["labels"] == processor.tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_tokenizer_without_bos(tiny_processor_without_bos):
    batch = OtterCollator(tiny_processor_without_bos)([sample([("Q", "A")])])
    assert text_of(tiny_processor_without_bos, batch["input_ids"][0]) == "User:Q GPT:<answer>A<|endofchunk|></s>"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "fuyu"}, "'fuyu' has no <image>"),
        ({"format": "idefics"}, "no '<end_of_utterance>' token"),
        ({"format": "vicuna"}, "'vicuna'"),
        ({"on_overlong": "ignore"}, "'ignore'"),
    ],
)
def test_options_are_checked(tiny_processor, options, message):
    with pytest.raises(ValueError, match=message):
        OtterCollator(tiny_processor, **options)


def test_sample_errors_survive_worker_processes():
    error = pickle.loads(pickle.dumps(SampleError("Sample 'a' is too long.", reason="overlong")))
    assert (error.reason, str(error)) == ("overlong", "Sample 'a' is too long.")


def test_packed_rows_hold_the_samples_one_behind_the_other(tiny_processor, by_colour):
    red, blue = [by_colour["red"]], [by_colour["blue"]]
    samples = [
        sample([("what?", "red")], [red]),
        sample([("no picture", "right"), ("and?", "none")], id="S2"),
        sample([("one", "a"), ("two", "bb")], [blue, red], [1, 1], id="S3"),
    ]
    padded = OtterCollator(tiny_processor)(samples)
    packed = OtterCollator(tiny_processor, packing=True)(samples)
    real = padded["attention_mask"].bool()
    lengths = real.sum(dim=1).tolist()
    assert packed["input_ids"].shape == (1, sum(lengths))
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][real])
    assert torch.equal(packed["labels"][0], padded["labels"][real])
    assert packed["position_ids"][0].tolist() == [i for length in lengths for i in range(length)]
    assert (
        packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, *torch.tensor(lengths).cumsum(0)]
    )
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["max_length_q"] == packed["max_length_k"] == max(lengths)
    assert "attention_mask" not in packed
    # the red picture of the first sample, none of the second, blue and then red of the third
    assert packed["pixel_values"].shape[:3] == (1, 3, 1)
    assert packed["pixel_values"][0, :, 0, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    first, second, third = packed["media_index"][0].split(lengths)
    assert set(first.tolist()) == {0, 1}
    assert set(second.tolist()) == {0}
    assert third.tolist() == sorted(third.tolist()) and set(third.tolist()) == {0, 2, 3}
    for index in (first, third):
        assert index[0] == 0  # BOS stands in front of the picture


def test_packed_text_only_batch_still_has_pixels(tiny_processor):
    packed = OtterCollator(tiny_processor, packing=True)([sample([("a", "b")]), sample([("c", "d")])])
    assert packed["pixel_values"].shape[:3] == (1, 1, 1)
    assert not packed["media_index"].any()


def test_a_cut_answer_does_not_run_into_the_next_sample(tiny_processor):
    samples = [sample([("a", "long " * 9)]), sample([("question", "b")])]
    packed = OtterCollator(tiny_processor, max_length=32, on_overlong="truncate", packing=True)(samples)
    start = packed["cu_seq_lens_q"][1]
    end_of_question = (packed["input_ids"][0, start:] == tiny_processor.answer_token_id).nonzero()[0]
    assert (packed["labels"][0, start : start + end_of_question + 1] == -100).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("removed", [("<answer>",), ("<|endofchunk|>",), ("<answer>", "<|endofchunk|>")])
def test_removed_tokens(tiny_processor, by_colour, removed, packing):
    """Ids without these tokens, and the labels that the other tokens had with them."""
    red, blue = [by_colour["red"]], [by_colour["blue"]]
    samples = [
        sample([("Q1", "A1"), ("Q2", "A2")], [red, blue], media_per_turn=[1, 1]),
        sample([("Q", "a long answer")], [red]),
    ]
    whole = OtterCollator(tiny_processor, packing=packing)(samples)
    batch = OtterCollator(
        tiny_processor,
        packing=packing,
        remove_answer_token="<answer>" in removed,
        remove_end_of_turn_token="<|endofchunk|>" in removed,
    )(samples)
    assert whole.keys() == batch.keys() and batch["pixel_values"].equal(whole["pixel_values"])

    def rows(batch, key):
        if packing:
            return batch[key][0].split(batch["cu_seq_lens_q"].diff().tolist())
        return [row[mask.bool()] for row, mask in zip(batch[key], batch["attention_mask"], strict=True)]

    removed_ids = torch.tensor(tiny_processor.tokenizer.convert_tokens_to_ids([*removed]))
    kept = [~torch.isin(ids, removed_ids) for ids in rows(whole, "input_ids")]
    for key in ("input_ids", "labels", *(["media_index"] if packing else [])):
        for row, before, keep in zip(rows(batch, key), rows(whole, key), kept, strict=True):
            assert row.equal(before[keep])
    ids, labels = rows(batch, "input_ids")[0], rows(batch, "labels")[0]
    text = "<s><image>User:Q1 GPT:<answer>A1<|endofchunk|><image>User:Q2 GPT:<answer>A2<|endofchunk|></s>"
    learned = "A1<|endofchunk|>A2<|endofchunk|></s>"
    for token in removed:
        text, learned = text.replace(token, ""), learned.replace(token, "")
    assert text_of(tiny_processor, ids) == text and text_of(tiny_processor, ids[labels != -100]) == learned
    if packing:
        assert batch["position_ids"][0].tolist() == [i for keep in kept for i in range(int(keep.sum()))]
    else:
        padding = ~batch["attention_mask"].bool()
        assert batch["input_ids"].shape[1] == max(int(keep.sum()) for keep in kept)
        assert (batch["labels"][padding] == -100).all()


def test_something_must_end_an_answer(tiny_processor):
    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="remove_end_of_turn_token: the tokenizer has no end-of-sequence token"):
        OtterCollator(processor, remove_end_of_turn_token=True)


@pytest.mark.parametrize("writes", [True, False])
def test_prompts_begin_as_samples_do(tiny_processor, by_colour, writes):
    """GPT-NeoX's tokenizer, which is MPT's, has a BOS and does not write it; training puts it in front in any case."""
    processor = copy.deepcopy(tiny_processor)
    if writes:
        bos = [("<s>", processor.tokenizer.bos_token_id)]
        processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, bos)
    collate = OtterCollator(processor, format="spaced")
    trained = collate([sample([("What?", "A Cat")], [[by_colour["red"]]])])["input_ids"][0].tolist()
    assert collate.adds_bos != writes and trained[0] == processor.tokenizer.bos_token_id
    processor.chat_template = chat_template("spaced", bos=collate.adds_bos)
    content = [{"type": "image", "image": by_colour["red"]}, {"type": "text", "text": "What?"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert list(asked) == trained[: len(asked)]


@pytest.mark.parametrize("kind", ["LLaMA", "bytes"])
@pytest.mark.parametrize("format", ["simple", "spaced"])
def test_a_flamingo_reads_earlier_answers_as_it_was_trained_on_them(tiny_processor, by_colour, kind, format):
    """LLaMA's tokenizer puts a blank in front of the text behind a token, and `<answer>` is none for a Flamingo."""
    tokenizer = copy.deepcopy(tiny_processor.tokenizer)
    if kind == "LLaMA":
        letters = sorted({*"User:GPTACatWhisone?"})
        vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *letters, "▁A"])}
        backend = Tokenizer(models.BPE(vocabulary, [("▁", "A")], unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    processor = FlamingoProcessor(tiny_processor.image_processor, FlamingoProcessor.prepare_tokenizer(tokenizer))
    collate = FlamingoCollator(processor, format=format)
    batch = collate([sample([("What?", "A Cat"), ("Is it one?", "A Cat")], [[by_colour["red"]]])])
    learned = (batch["labels"][0] != -100).nonzero()[:, 0].tolist()
    last = max(place for place in learned if place - 1 not in learned)
    processor.chat_template = chat_template(
        format, removed_tokens=collate.removed_tokens, answer_lead=collate.answer_lead
    )
    content = [{"type": "image", "image": by_colour["red"]}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A Cat"},
        {"role": "user", "content": "Is it one?"},
    ]
    options = {"add_special_tokens": False}
    asked = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=options
    )
    assert list(asked["input_ids"][0]) == batch["input_ids"][0, 1:last].tolist()
