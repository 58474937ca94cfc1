"""Models asked in conversations: batches, log-probabilities, Idefics."""

import pytest
import torch
from PIL import Image

from otter_hf.evaluation.model import ConversationModel
from otter_hf.prompts import chat_template
from otter_hf.testing import write_tiny


@pytest.fixture
def idefics_folder(tmp_path):
    """A tiny Idefics-instruct on disk."""
    return write_tiny("idefics", tmp_path / "idefics")


@pytest.fixture(params=["otter", "otterhd", "idefics"])
def loaded(request):
    return ConversationModel(request.getfixturevalue(f"{request.param}_folder"), dtype="float32", device="cpu")


def ask(question: str, *pictures, shown=()) -> list[dict]:
    messages = []
    for picture, answer in shown:
        messages += ask("What is it?", picture)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [*messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def test_a_batch_equals_its_rows(loaded, pictures):
    conversations = [ask("Hi, what is this?", pictures[0]), ask("And?", *pictures[1:3])]
    together = loaded.generate(conversations, max_new_tokens=5)
    assert together == [loaded.generate([c], max_new_tokens=5)[0] for c in conversations]
    assert together != loaded.generate([ask("Hi, what is this?", pictures[2]), conversations[1]], max_new_tokens=5)


@pytest.fixture
def many(pictures):
    """Questions of several lengths behind the same two examples, the last without a picture of its own."""
    shown = [(pictures[0], "red"), (pictures[1], "green")]
    texts = ["And this?", "What is it, please?", "So?", "Hi, what do you see here?"]
    return [ask(text, pictures[2 + i % 2], shown=shown) for i, text in enumerate(texts)] + [ask("Why?", shown=shown)]


@pytest.mark.parametrize("beams", [1, 3])
def test_many_are_answered_as_if_asked_alone(loaded, many, beams):
    """In batches of like length, worked examples read once, beams parting from one reading of the prompt."""
    read = []
    decoder = loaded.model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, given: read.append(
            (given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]).shape[:2]
        ),
        with_kwargs=True,
    )
    options = {"max_new_tokens": 4, "num_beams": beams}
    together = loaded.generate(many, batch_size=2, **options)
    in_total, width = sum(rows * length for rows, length in read), max(length for _, length in read)
    hook.remove()
    expected = []
    for conversation in many:
        inputs = loaded.prepare([conversation])
        with torch.no_grad():
            output = loaded.model.generate(**inputs, do_sample=False, **options)
        answer = loaded.processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
        expected.append(answer.strip())
    assert together == expected and len(set(together)) > 1
    if not loaded.is_idefics:
        lengths = [loaded.prepare([conversation])["input_ids"].shape[1] for conversation in many]
        # the longest thing read is the examples, and all that is read is less than a third of the prompts with beams
        assert width < min(lengths) and in_total < sum(lengths) * (1 if beams == 1 else 1.2)


def test_candidates_of_many_conversations(loaded, many):
    """Those that begin alike, that are one token long, and that are the same."""
    candidates = ["a", "red dog", "red dog two", "red", "red dog", "blue!"]
    scores = {}
    for found in loaded.log_likelihoods(many, [candidates] * len(many), batch_size=2):
        scores |= found
    assert sorted(scores) == [0, 1, 2, 3, 4]
    for number, conversation in enumerate(many):
        for candidate, (total, count, greedy) in zip(candidates, scores[number], strict=True):
            (alone,) = loaded.log_likelihood(conversation, [candidate])
            assert total == pytest.approx(alone[0], rel=1e-4) and (count, greedy) == alone[1:]
    only = list(loaded.log_likelihoods(many, [candidates] * len(many), batch_size=2, wanted={3}))
    assert len(only) == 1 and 3 in only[0]


def test_log_likelihoods_equal_one_pass_over_everything(loaded, pictures):
    conversation = ask("Which?", pictures[3], shown=[(pictures[0], "red"), (pictures[1], "green")])
    candidates = ["a", "two dogs", "blue!"]
    scores = loaded.log_likelihood(conversation, candidates, batch_size=2)
    inputs = loaded.prepare([conversation])
    start = inputs["input_ids"].shape[1]
    for candidate, (total, count, greedy) in zip(candidates, scores, strict=True):
        ids = torch.tensor([loaded.processor.tokenizer(candidate, add_special_tokens=False)["input_ids"]])
        assert count == ids.shape[1]
        whole = dict(inputs)
        whole["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "image_attention_mask" in whole:
            last = whole["image_attention_mask"][:, -1:].expand(-1, count, -1)
            whole["image_attention_mask"] = torch.cat([whole["image_attention_mask"], last], dim=1)
        with torch.no_grad():
            logits = loaded.model(**whole).logits[0, start - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[0][:, None]).sum()
        assert total == pytest.approx(float(expected), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == ids[0]).all())
    with pytest.raises(ValueError, match="Candidate 1 of 2 is empty"):
        loaded.log_likelihood(conversation, ["a", ""])


def test_pictures_are_encoded_once_for_all_candidates(otter_folder, pictures):
    loaded = ConversationModel(otter_folder, dtype="float32", device="cpu")
    calls = []
    loaded.model.model.vision_tower.register_forward_pre_hook(lambda *inputs: calls.append(1))
    loaded.log_likelihood(ask("?", pictures[3], shown=[(pictures[0], "red")]), list("abcdefg"), batch_size=2)
    assert calls == [1]


def test_answers_end_at_the_stop_text_and_options_go_before_what_a_task_asks(otter_folder, pictures, monkeypatch):
    options = {"chat_template": "llama2", "generation": {"max_new_tokens": 2}}
    loaded = ConversationModel(otter_folder, dtype="float32", device="cpu", **options)
    assert loaded.chat_template == chat_template("llama2")
    monkeypatch.setattr(
        type(loaded.processor), "post_process_image_text_to_text", lambda self, ids: [f"{ids.shape[1]} a\n\nb STOP c"]
    )
    assert loaded.generate([ask("?", pictures[0])], until=["STOP", "\n\n"], max_new_tokens=9) == ["2 a"]


def test_a_film_is_taken_as_a_film_or_as_its_frames(loaded, pictures):
    film = {"type": "video", "video": pictures[:2]}
    content = [film, {"type": "text", "text": "What?"}]
    inputs = loaded.prepare([[{"role": "user", "content": content}]])
    if hasattr(loaded.model.config, "perceiver_num_latents"):
        assert inputs["pixel_attention_mask"].tolist() == [[[1, 1]]] and inputs["image_hidden_states"].shape[1] == 1
    else:
        asked = loaded.prepare([ask("What?", *pictures[:2])])
        assert inputs.keys() == asked.keys() and torch.equal(inputs["input_ids"], asked["input_ids"])


def test_pictures_as_in_2023(loaded):
    clear = Image.new("RGBA", (30, 28), (200, 0, 0, 0))
    today = loaded.prepare([ask("What?", clear)])
    loaded.processor_kwargs = {"legacy_pictures": True}
    before = loaded.prepare([ask("What?", clear)])
    red = loaded.prepare([ask("What?", Image.new("RGB", (30, 28), (200, 0, 0)))])
    name = next(name for name in today if name in ("image_hidden_states", "pixel_values", "image_patches"))
    assert torch.equal(before[name][0], red[name][0]) and not torch.equal(before[name][0], today[name][0])


def test_what_a_template_refuses_is_a_value_error(otter_folder, otterhd_folder):
    for folder in (otter_folder, otterhd_folder):
        loaded = ConversationModel(folder, dtype="float32", device="cpu")
        with pytest.raises(ValueError, match="user and assistant must alternate and start with user"):
            loaded.prepare([[{"role": "assistant", "content": "hi"}]])


def test_idefics_is_asked_in_the_form_it_was_trained_on(idefics_folder, pictures):
    loaded = ConversationModel(idefics_folder, dtype="float32", device="cpu")
    inputs = loaded.prepare([ask("Which?", pictures[1], shown=[(pictures[0], "red")])])
    picture = "<fake_token_around_image><image><fake_token_around_image>"
    assert loaded.processor.tokenizer.decode(inputs["input_ids"][0]).removeprefix("<s>") == (
        f"User:{picture}What is it?<end_of_utterance>\nAssistant:red<end_of_utterance>\n"
        f"User:{picture}Which?<end_of_utterance>\nAssistant:"
    )
    assert inputs["pixel_values"].shape[1] == 2


def test_a_model_without_a_template_asks_for_one(otter_folder, pictures):
    loaded = ConversationModel(otter_folder, dtype="float32", device="cpu")
    loaded.processor.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        loaded.generate([ask("?", pictures[0])])
