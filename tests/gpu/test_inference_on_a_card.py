"""Loading, answering, and what is kept and saved, on a CUDA card; what is expected is what the CPU says."""

import copy
import pickle
import threading

import pytest
import torch


if not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

from pathlib import Path

from card_models import (
    CARD,
    CONVERSATIONS,
    EXAMPLES,
    FAMILIES,
    GREEDY,
    NAMES_OF_TYPES,
    PICTURES,
    answer_of,
    distance,
    logits_of,
    needs_bits,
    needs_flash,
    prepare,
    turn,
)
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils import is_flash_attn_2_available

from otter_hf.evaluation.model import ConversationModel
from otter_hf.loading import load, load_model
from otter_hf.models.continuous_batching import ContinuousBatch
from otter_hf.models.media_store import MediaStore
from otter_hf.models.prefix_store import PrefixStore
from otter_hf.models.skills import Skill
from otter_hf.serving.session import ChatSession


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("convolutions_in_float32")]
DEMO = Path(__file__).parents[2] / "out" / "demo" / "model"


# ----- loading, and one forward pass -----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "dtype, attention, limit",
    [
        (torch.float32, None, 1e-4),
        (torch.float32, "eager", 1e-4),
        (torch.float32, "varlen_sdpa", 1e-4),
        (torch.bfloat16, None, 0.08),
        (torch.bfloat16, "eager", 0.08),
        (torch.bfloat16, "varlen_sdpa", 0.08),
        pytest.param(torch.bfloat16, "flash_attention_2", 0.08, marks=needs_flash),
        (torch.float16, None, 0.01),
        (torch.float16, "eager", 0.01),
        (torch.float16, "varlen_sdpa", 0.01),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_folder_is_loaded_and_says_what_the_cpu_says(family, dtype, attention, limit, side, folder_of, made):
    model = load_model(folder_of(family), dtype=NAMES_OF_TYPES[dtype], attn_implementation=attention)
    assert model.device == CARD and model.dtype == dtype
    inputs = prepare(made(family)[1], CONVERSATIONS, side)
    expected = logits_of(made(family)[0], inputs, "cpu")
    assert distance(logits_of(model, inputs), expected) < limit


def devices_of(family, kind, model):
    """Keyword arguments of `from_pretrained`."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if kind == "offload":
        return {"device_map": "auto", "max_memory": {0: int(size * 0.7), "cpu": 2**30}}
    if kind == "first part offloaded":
        names = ["model.vision_embed_tokens"] if family == "otterhd" else ["model.vision_tower", "model.perceiver"]
        return {"device_map": {**dict.fromkeys(names, "cpu"), "model.language_model": 0, "lm_head": 0}}
    if kind == "all but the head offloaded":
        first = "model.vision_embed_tokens" if family == "otterhd" else "model.vision_tower"
        names = [first, "model.language_model"] + (["model.perceiver"] if family != "otterhd" else [])
        return {"device_map": {**dict.fromkeys(names, "cpu"), "lm_head": 0}}
    return {"device_map": kind}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind", ["cuda", "cuda:0", 0, "auto", "offload", "first part offloaded", "all but the head offloaded"]
)
def test_device_maps(family, kind, folder_of, made):
    expected, processor = made(family)
    if family == "otter-mpt" and kind == "all but the head offloaded":
        pytest.skip("its head is its embedding")
    devices = devices_of(family, kind, expected)
    model = AutoModelForImageTextToText.from_pretrained(folder_of(family), dtype=torch.float32, **devices).eval()
    assert model.device == CARD  # where inputs go
    if isinstance(kind, str) and "offload" in kind:
        assert any(parameter.is_meta for parameter in model.parameters())
    inputs = prepare(processor, CONVERSATIONS)
    assert distance(logits_of(model, inputs), logits_of(expected, inputs, "cpu")) < 1e-4
    assert torch.equal(answer_of(model, inputs.to(CARD)), answer_of(expected, inputs.to("cpu")))
    said = [ChatSession(one, processor).ask("what?", part(PICTURES[2]), **GREEDY) for one in (model, expected)]
    assert said[0] == said[1]


def part(*pictures):
    return [{"type": "image", "image": picture} for picture in pictures]


@needs_bits
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits, agreement", [(4, 0.8), (8, 0.97)])
def test_quantized(family, bits, agreement, folder_of, made):
    if bits == 4:
        model = load_model(folder_of(family), load_in_4bit=True, dtype="bfloat16")
    else:
        model = AutoModelForImageTextToText.from_pretrained(
            folder_of(family), quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float16
        ).eval()
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    inputs = prepare(made(family)[1], CONVERSATIONS)
    logits = torch.stack([logits_of(model, inputs).flatten(), logits_of(made(family)[0], inputs, "cpu").flatten()])
    assert torch.corrcoef(logits)[0, 1] > agreement
    assert answer_of(model, inputs.to(CARD, model.dtype)).shape == (2, 12)


# ----- answers -----


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_how_they_are_made(family, made, on_card):
    (reference, processor), (model, _) = made(family), on_card(family)
    inputs = prepare(processor, CONVERSATIONS)
    expected = answer_of(reference, inputs)
    moved = prepare(processor, CONVERSATIONS).to(CARD)
    assert torch.equal(answer_of(model, moved), expected)
    assert torch.equal(answer_of(model, moved, use_cache=False), expected)
    assert torch.equal(answer_of(model, moved, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(answer_of(model, moved, cache_implementation="offloaded"), expected)
    for row, conversation in enumerate(CONVERSATIONS):
        alone = prepare(processor, [conversation]).to(CARD)
        assert torch.equal(answer_of(model, alone), expected[row : row + 1])
        assert torch.equal(answer_of(model, alone, prompt_lookup_num_tokens=3), expected[row : row + 1])
    beams = answer_of(model, moved, num_beams=3)
    assert torch.equal(beams, answer_of(reference, inputs, num_beams=3))
    assert torch.equal(beams, answer_of(model, moved, num_beams=3, use_cache=False))
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(answer_of(model, moved, do_sample=True, top_k=0, num_return_sequences=2))
    assert drawn[0].shape == (4, 12) and torch.equal(*drawn)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_another_picture_and_what_layers_say(family, on_card):
    model, processor = on_card(family)
    one, other = (prepare(processor, [turn("what is it?", picture)]).to(CARD) for picture in PICTURES[1:3])
    if family == "otterhd":  # one size, so as many tokens
        picture = Image.new("RGB", PICTURES[1].size, "blue")
        other = prepare(processor, [turn("what is it?", picture)]).to(CARD)
    model.set_attn_implementation("eager")
    outputs = model(**one, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    for states in (*outputs.attentions, *outputs.hidden_states):
        assert states.device == CARD and states.isfinite().all()
    torch.testing.assert_close(outputs.logits, model(**one).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs.logits[:, -1], model(**other).logits[:, -1], atol=1e-3)
    blob = pickle.dumps(outputs)
    assert torch.equal(pickle.loads(blob).logits, outputs.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers(family, dtype, made, on_card):
    model, processor = copy.deepcopy(made(family)[0]).to(CARD), made(family)[1]
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    inputs = prepare(processor, CONVERSATIONS).to(CARD, dtype)
    assert inputs["pixel_values"].dtype == dtype and inputs["input_ids"].dtype == torch.int64
    assert answer_of(model, inputs).shape == answer_of(model, inputs, num_beams=2).shape == (2, 12)
    with torch.autocast("cuda", dtype):
        full = on_card(family)[0]
        assert answer_of(full, prepare(processor, CONVERSATIONS).to(CARD)).shape == (2, 12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_flash_and_variable_length_attention_while_decoding(family, folder_of, made):
    inputs = prepare(made(family)[1], CONVERSATIONS)
    names = ["varlen_sdpa"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    for name in names:
        model = load_model(folder_of(family), dtype="bfloat16", attn_implementation=name)
        moved = inputs.to(CARD, torch.bfloat16)
        output = model.generate(**moved, **GREEDY, return_dict_in_generate=True, output_logits=True)
        ids = output.sequences
        # what each step said, against one pass over all: steps and rows may not see what they should not
        rows = {**moved, "input_ids": ids[:, :-1]}
        rows["attention_mask"] = torch.nn.functional.pad(moved["attention_mask"], (0, 11), value=1)
        whole = model(**rows).logits[:, -12:].float()
        assert distance(torch.stack(output.logits, dim=1).float(), whole) < 0.08, name


def test_streaming(on_card):
    model, processor = on_card("otter")
    inputs = prepare(processor, CONVERSATIONS[:1]).to(CARD)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    said = "".join(streamer)
    thread.join()
    assert said == processor.decode(answer_of(model, inputs)[0], skip_special_tokens=True)


def shapes():
    pictures = []
    for colour, draw in (("red", "ellipse"), ("blue", "rectangle"), ("green", "ellipse")):
        picture = Image.new("RGB", (64, 64), "white")
        getattr(ImageDraw.Draw(picture), draw)((16, 16, 48, 48), fill=colour)
        pictures.append(picture)
    return pictures


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not trained here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_trained_demo_model_answers_as_on_the_cpu(dtype):
    questions = ("what color is the shape?", "what shape is in the image?", "is there a circle?")
    conversations = [turn(question, picture) for picture in shapes() for question in questions]
    conversations.append([*turn(questions[0], shapes()[0], answer="red"), *turn(questions[0], shapes()[1])])
    said = {}
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        asked = ConversationModel(DEMO, device=device, dtype=precision)
        said[device] = asked.generate(conversations, batch_size=4, max_new_tokens=8)
    assert said["cuda"] == said["cpu"] and len(set(said["cpu"])) > 2


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_pipeline(family, folder_of, on_card):
    pipe = pipeline("image-text-to-text", model=folder_of(family), device=0)
    (result,) = pipe(text=CONVERSATIONS[0], max_new_tokens=6, generate_kwargs={"do_sample": False})
    model, processor = on_card(family)
    inputs = prepare(processor, CONVERSATIONS[:1]).to(CARD)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    (expected,) = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])
    assert result["generated_text"][-1] == {"role": "assistant", "content": expected}


# ----- what is kept: media, prefixes, skills, batches -----


def test_media_kept_on_the_card_and_on_disk(on_card, tmp_path):
    model, processor = on_card("otter")
    inputs = prepare(processor, CONVERSATIONS)
    expected = answer_of(model, prepare(processor, CONVERSATIONS).to(CARD))
    for hits in (0, 3):
        store = MediaStore(model, folder=tmp_path)
        encoded = store.encode(inputs)
        assert store.hits == hits and encoded["image_hidden_states"].device == CARD
        moved = {name: value.to(CARD) for name, value in encoded.items()}
        assert torch.equal(answer_of(model, moved), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)  # other weights, and numbers that numpy does not know
    for hits in (0, 3):
        store = MediaStore(half, folder=tmp_path)
        assert store.encode(inputs)["image_hidden_states"].dtype == torch.bfloat16 and store.hits == hits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skills_and_prefixes(family, dtype, made, tmp_path):
    reference, processor = made(family)
    model = copy.deepcopy(reference).to(CARD, dtype)
    skill = Skill.compile(model, processor, EXAMPLES)
    skill.save(tmp_path / "skill")
    loaded = Skill.load(tmp_path / "skill", model, processor)
    questions = [[*loaded.messages, *turn("now?", PICTURES[2])], [*loaded.messages, *turn("again, please?")]]
    inputs = prepare(processor, questions)
    moved = inputs.to(CARD, dtype)
    caches = [one.cache_for(moved) for one in (skill, loaded)]
    for cache in caches:
        assert cache.layers[0].keys.device == CARD and cache.get_seq_length() > 32
    answers = [answer_of(model, moved, past_key_values=cache) for cache in caches]
    assert torch.equal(*answers)
    if dtype == torch.float32:
        assert torch.equal(answers[0], answer_of(model, moved))
        # a file from the card, on the CPU
        on_cpu = Skill.load(tmp_path / "skill", reference, processor)
        inputs = prepare(processor, questions)
        assert torch.equal(answer_of(reference, inputs, past_key_values=on_cpu.cache_for(inputs)), answers[0])
    session = ChatSession(model, processor, skill=loaded)
    said = [session.ask(question, part(PICTURES[3]), **GREEDY) for question in ("now?", "and now?")]
    assert len(session.messages) == len(EXAMPLES) + 4 and all(isinstance(text, str) for text in said)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_that_goes_on(family, made, on_card):
    (reference, processor), (model, _) = made(family), on_card(family)
    sessions = [ChatSession(model, processor), ChatSession(model, processor, reuse_cache=False)]
    sessions.append(ChatSession(reference, processor))
    for question, pictures in (("what?", PICTURES[:1]), ("and this?", PICTURES[1:2]), ("which?", [])):
        first, *others = [session.ask(question, part(*pictures), **GREEDY) for session in sessions]
        assert others == [first, first]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_continuous_batching(family, dtype, made):
    model, processor = copy.deepcopy(made(family)[0]).to(CARD, dtype), made(family)[1]
    conversations = [*CONVERSATIONS, turn("no picture at all"), [*EXAMPLES, *turn("now?", PICTURES[3])]]
    prefixes = PrefixStore(model, MediaStore(model) if family != "otterhd" else None)
    batch, rows, prompts = ContinuousBatch(model), [], []
    for number, conversation in enumerate(2 * conversations):
        inputs = prepare(processor, [conversation])
        prompts.append(inputs)
        settings = {**GREEDY} if number % 3 else {**GREEDY, "do_sample": True, "top_p": 0.9}
        prefix = prefixes.prefix_of(inputs)
        rows.append((batch.submit(inputs, prefix=prefix, seed=number, **settings), settings))
        batch.step()
    batch.run()
    for number, (row, settings) in enumerate(rows):
        assert row.finish == "length" and row.error is None and len(row.tokens) == 12
        if dtype == torch.float32:
            torch.manual_seed(number)
            alone = answer_of(model, prompts[number].to(CARD), **settings)
            assert row.tokens == alone[0].tolist(), number


# ----- files from and for elsewhere -----


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_from_the_card_and_read_anywhere(family, on_card, made, tmp_path):
    model, processor = on_card(family)
    model.save_pretrained(tmp_path)
    inputs = prepare(processor, CONVERSATIONS)
    expected = logits_of(made(family)[0], inputs, "cpu")
    on_cpu = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(on_cpu, inputs, "cpu"), expected)


@pytest.mark.parametrize("family", ["otter", "flamingo"])
def test_a_checkpoint_with_the_names_of_2023(family, made, tmp_path):
    model, processor = made(family)
    model.save_pretrained(tmp_path, save_original_format=True)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    loaded, _ = load(str(tmp_path), device_map="cuda")
    inputs = prepare(processor, CONVERSATIONS)
    assert loaded.device == CARD
    assert distance(logits_of(loaded, inputs), logits_of(model, inputs, "cpu")) < 1e-4


@pytest.mark.parametrize("family", ["otter", "otterhd"])
@pytest.mark.parametrize("options", [{}, pytest.param({"load_in_4bit": True}, marks=needs_bits)])
def test_an_adapter(family, options, folder_of, made, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForImageTextToText.from_pretrained(folder_of(family))
    modules = ["q_proj", "v_proj"] if family == "otter" else ["query_key_value"]
    config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), **options)
    assert model.device == CARD
    inputs = prepare(made(family)[1], CONVERSATIONS)
    expected = logits_of(base, inputs, "cpu")
    assert distance(logits_of(model, inputs), expected) < (1e-4 if not options else 0.7)
    assert answer_of(model, inputs.to(CARD, model.dtype)).shape == (2, 12)


# ----- compiled -----


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_compiled_forward_pass(family, on_card):
    model, processor = on_card(family)
    inputs = prepare(processor, CONVERSATIONS).to(CARD)
    expected = model(**inputs, use_cache=False).logits
    # kernels are generated for one of them, for the others the graph is traced
    compiled = torch.compile(model.forward, backend="inductor" if family == "otter" else "eager")
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits[keep], expected[keep], rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["otter", "otter-mpt", "otterhd"])
def test_a_static_cache_compiled(family, on_card):
    """`generate` compiles decoding steps with CUDA graphs where the cache is static."""
    model, processor = on_card(family)
    answers = []
    for conversation in CONVERSATIONS:
        inputs = prepare(processor, [conversation]).to(CARD)
        answers.append(answer_of(model, inputs))
        assert torch.equal(answer_of(model, inputs, cache_implementation="static"), answers[-1])
    torch._dynamo.reset()
    cache = StaticCache(model.config.get_text_config(), max_cache_len=512)
    inputs = prepare(processor, CONVERSATIONS[1:]).to(CARD)
    assert torch.equal(answer_of(model, inputs, past_key_values=cache, disable_compile=True), answers[1])
