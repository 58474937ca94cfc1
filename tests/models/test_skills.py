"""Skills: what a model has read of worked examples, in memory and on disk, changes nothing but the work."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_flamingo import DECODERS
from transformers import AutoConfig

from otter_hf import FlamingoForConditionalGeneration, FlamingoProcessor
from otter_hf.models.prepared_media import PreparedMedium
from otter_hf.models.skills import Skill, describe_skill
from otter_hf.prompts import chat_template
from otter_hf.testing import otter as otter_tiny
from otter_hf.testing import otterhd as otterhd_tiny


COLORS = ("red", "green", "blue", "yellow", "black")
PICTURES = [Image.new("RGB", (40, 30 + 4 * i), color) for i, color in enumerate(COLORS)]


def turn(question, picture=None, answer=None):
    media = [] if picture is None else [{"type": "image", "image": picture}]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


EXAMPLES = [
    *turn("what color?", PICTURES[0], "red"),
    *turn("and this one?", PICTURES[1], "it is green"),
    *turn("is it dark?", None, "no"),
]
QUESTIONS = [turn("and now?", PICTURES[2]), turn("what was the first one, please?"), turn("x", PICTURES[3])]


def of_family(name):
    if name == "otterhd":
        processor = otterhd_tiny.tiny_processor()
        return otterhd_tiny.tiny_model(processor, max_position_embeddings=4096), processor
    if name == "otter":
        processor = otter_tiny.tiny_processor()
        return otter_tiny.tiny_model(processor), processor
    # a Flamingo with another decoder and a template of more pieces
    processor = otter_tiny.tiny_processor(FlamingoProcessor)
    processor.chat_template = chat_template("spaced")
    config = otter_tiny.tiny_model(processor, FlamingoForConditionalGeneration).config
    decoder = {**DECODERS[name], "vocab_size": len(processor.tokenizer), "max_seq_len": 4096}
    if name != "otter_mpt":
        decoder |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
        decoder |= {"num_key_value_heads": 2}
    config.text_config = AutoConfig.for_model(name, **decoder)
    torch.manual_seed(0)
    model = FlamingoForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model, processor


SLIDING = pytest.param("gemma3_text", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["otter", "otter_mpt", SLIDING, "otterhd"])
def family(request):
    model, processor = of_family(request.param)
    return model, processor, Skill.compile(model, processor, EXAMPLES)


@pytest.fixture(scope="module")
def otter():
    model, processor = of_family("otter")
    return model, processor, Skill.compile(model, processor, EXAMPLES)


def prompt(processor, *conversations):
    return processor.apply_chat_template(
        list(conversations), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


class Work:
    """Counts the columns that a model reads, and the media it encodes."""

    def __init__(self, model):
        self.columns, self.media = 0, 0
        self.hooks = [model.model.register_forward_pre_hook(self.count, with_kwargs=True)]
        if hasattr(model.model, "vision_tower"):
            tower = model.model.vision_tower
            self.hooks.append(tower.register_forward_pre_hook(self.count_media, with_kwargs=True))

    def count(self, module, args, kwargs):
        self.columns += kwargs["input_ids"].shape[1]

    def count_media(self, module, args, kwargs):
        self.media += len((*args, *kwargs.values())[0])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def check(model, inputs, cache, **options):
    """Answers and logits are those of the whole prompt."""
    expected = generate(model, inputs, **options)
    given = generate(model, inputs, past_key_values=cache, **options)
    assert torch.equal(given.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(given.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


def test_an_answer_with_it_is_that_of_the_whole_prompt(family):
    model, processor, skill = family
    for question in QUESTIONS[:2]:
        for examples in (EXAMPLES, skill.messages):
            inputs = prompt(processor, examples + question)
            cache = skill.cache_for(inputs)
            assert skill.prefix_of(inputs) is skill.prefix_of(inputs)
            assert skill.prefix_of(inputs).get_seq_length() == cache.get_seq_length()
            # the template's words in front of a question are in it, those in front of a picture are not
            assert cache.get_seq_length() >= skill.input_ids.shape[1] - 6
            check(model, inputs, cache)
    # it stays as it was
    assert skill.cache.get_seq_length() == skill.input_ids.shape[1]


def test_rows_of_any_length_share_it(family):
    model, processor, skill = family
    inputs = prompt(processor, *(skill.messages + question for question in QUESTIONS))
    cache = skill.cache_for(inputs)
    assert cache.get_seq_length() >= skill.input_ids.shape[1] - 6
    check(model, inputs, cache)
    # beams, rows that begin otherwise, padding on the right
    check(model, inputs, skill.cache_for(inputs, num_beams=2), num_beams=2)
    others = [skill.messages + QUESTIONS[0], turn("who?"), turn("what color?", PICTURES[0], "red") + QUESTIONS[1]]
    inputs = prompt(processor, *others)
    cache = skill.cache_for(inputs)
    check(model, inputs, cache)


def test_what_differs_is_read_again(family):
    model, processor, skill = family
    inputs = prompt(processor, [*turn("what color?", PICTURES[4], "red"), *QUESTIONS[0]])
    assert skill.cache_for(inputs) is None or skill.cache_for(inputs).get_seq_length() < 4
    # the second example's picture, then its words
    for example in (turn("and this one?", PICTURES[4], "it is green"), turn("and this one?", PICTURES[1], "green")):
        inputs = prompt(processor, [*EXAMPLES[:2], *example, *QUESTIONS[0]])
        cache = skill.cache_for(inputs)
        assert 10 < cache.get_seq_length() < skill.input_ids.shape[1]
        check(model, inputs, cache)
    assert skill.cache_for({"input_ids": torch.zeros(1, 5, dtype=torch.long)}) is None


def test_only_what_is_new_is_read(otter):
    model, processor, skill = otter
    inputs = prompt(processor, skill.messages + QUESTIONS[0])
    with Work(model) as work:
        generate(model, inputs, past_key_values=skill.cache_for(inputs))
    assert work.media == 1
    assert work.columns <= inputs["input_ids"].shape[1] - skill.input_ids.shape[1] + 6 + 5


def test_a_file_is_the_skill(family, tmp_path):
    model, processor, skill = family
    path = tmp_path / "colors.safetensors"
    skill.save(path)
    loaded = Skill.load(path, model, processor)
    inputs = prompt(processor, *(loaded.messages + question for question in QUESTIONS))
    for name, value in prompt(processor, *(EXAMPLES + question for question in QUESTIONS)).items():
        assert torch.equal(inputs[name], value)
    check(model, inputs, loaded.cache_for(inputs))
    told = describe_skill(path)
    assert (told["tokens"], told["media"]) == (skill.input_ids.shape[1], 2)
    assert told["messages"][1]["content"][0]["text"] == "red"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_models_skill_is_refused(otter, tmp_path):
    model, processor, skill = otter
    path = tmp_path / "colors.safetensors"
    skill.save(path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.perceiver.latents[0, 0] += 1e-3
    with pytest.raises(ValueError, match="is a skill of another model .weights was"):
        Skill.load(path, other, processor)
    with pytest.raises(ValueError, match='dtype was "float32" and is "bfloat16"'):
        Skill.load(path, copy.deepcopy(model).bfloat16(), processor)
    # how it was loaded changes nothing
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    other.config._name_or_path = "elsewhere"
    Skill.load(path, other, processor)
    changed = copy.deepcopy(processor)
    changed.chat_template = chat_template("llama2")
    with pytest.raises(ValueError, match="chat template was"):
        Skill.load(path, model, changed)
    changed = copy.deepcopy(processor)
    changed.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="image processor was"):
        Skill.load(path, model, changed)


def test_what_is_no_skill_is_refused(otter, tmp_path):
    model, processor, skill = otter
    with pytest.raises(FileNotFoundError, match="There is no skill"):
        Skill.load(tmp_path / "none.safetensors", model, processor)
    path = tmp_path / "it.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no skill, or damaged"):
        Skill.load(path, model, processor)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no skill of this version"):
        Skill.load(path, model, processor)
    skill.save(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != "keys.2"}  # noqa: SIM118
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged: it lacks 'keys.2'"):
        Skill.load(path, model, processor)
    skill.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no skill, or damaged"):
        Skill.load(path, model, processor)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder; name the file"):
        skill.save(tmp_path / "folder")
    with pytest.raises(ValueError, match="before media are encoded"):
        skill.cache_for({"input_ids": skill.input_ids, "image_hidden_states": torch.zeros(1)})
    with pytest.raises(ValueError, match="Linear is none of them"):
        Skill.compile(torch.nn.Linear(1, 1), processor, EXAMPLES)


def test_text_alone_and_half_precision(tmp_path):
    model, processor = of_family("otter")
    model.bfloat16()
    skill = Skill.compile(model, processor, [{"role": "system", "content": "Be brief."}])
    inputs = prompt(processor, skill.messages + turn("who?"))
    assert skill.cache_for(inputs).get_seq_length() > 8
    skill = Skill.compile(model, processor, EXAMPLES)
    skill.save(tmp_path / "it.safetensors")
    skill = Skill.load(tmp_path / "it.safetensors", model, processor)
    inputs = prompt(processor, EXAMPLES + QUESTIONS[0])  # pixels in float32 are the same pictures
    assert skill.cache_for(inputs).get_seq_length() >= skill.input_ids.shape[1] - 6
    assert skill.cache_for(inputs.to(model.dtype)).get_seq_length() >= skill.input_ids.shape[1] - 6


@pytest.mark.parametrize("tiny", [otter_tiny, otterhd_tiny], ids=["otter", "otterhd"])
def test_prepared_media_stand_for_their_pictures(tiny):
    processor = tiny.tiny_processor()
    messages = turn("a", PICTURES[0], "b") + QUESTIONS[0]
    ready = processor.prepare_media(messages)
    assert isinstance(ready[0]["content"][0]["image"], PreparedMedium)
    assert processor.prepare_media(ready)[0]["content"][0]["image"] is ready[0]["content"][0]["image"]
    for expected, given in zip(
        prompt(processor, messages, turn("c")).items(), prompt(processor, ready, turn("c")).items(), strict=True
    ):
        assert expected[0] == given[0] and torch.equal(expected[1], given[1])
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\]: .* there is no such file"):
        processor.prepare_media([{"role": "user", "content": [{"type": "image", "path": "nowhere.png"}]}])
    wrong = PreparedMedium(torch.zeros(1, 2, 2), (1, 1), (1.0, 1.0))
    with pytest.raises(ValueError, match="prepare it with this processor"):
        prompt(processor, turn("a", wrong, "b") + QUESTIONS[0])


def test_a_film_is_prepared_too(otter):
    _, processor, _ = otter
    film = {"type": "video", "video": PICTURES[:3]}
    messages = [
        {"role": "user", "content": [film, {"type": "image", "image": PICTURES[3]}, {"type": "text", "text": "a"}]}
    ]
    expected, given = prompt(processor, messages), prompt(processor, processor.prepare_media(messages))
    assert expected["pixel_values"].shape[1:3] == (2, 3)
    assert all(torch.equal(expected[name], given[name]) for name in expected)


def test_messages_are_kept_as_text(otter, tmp_path):
    _, _, skill = otter
    skill.save(tmp_path / "it.safetensors")
    with safe_open(tmp_path / "it.safetensors", framework="pt") as opened:
        messages = json.loads(opened.metadata()["messages"])
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what color?"}]
