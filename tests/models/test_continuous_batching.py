"""Rows of a running batch answer what they would alone, whoever joins and leaves."""

import gc
import weakref

import pytest
import torch
from tiny_flamingo import DECODERS, GREEDY, IMAGE, images, row, tiny_model
from transformers import GenerationConfig, LogitsProcessor

from otter_hf.models.continuous_batching import ContinuousBatch
from otter_hf.models.prefix_cache import compute_prefix
from otter_hf.serving.batch_thread import BatchThread
from otter_hf.testing import otterhd as otterhd_tiny


def prompt(*images_at, length=12, seed=0) -> dict:
    """A Flamingo's inputs for one row, with a picture of its own for each place."""
    inputs = {"input_ids": row(*images_at, length=length, seed=seed)}
    if images_at:
        inputs["pixel_values"] = images(1, len(images_at), seed=seed)
    return inputs


# no picture, several, one that is the last token, texts of 2 to 30 tokens
PROMPTS = [
    prompt(0, length=9, seed=1),
    prompt(length=14, seed=2),
    prompt(1, 8, 16, length=30, seed=3),
    prompt(0, 5, length=6, seed=4),
    prompt(length=2, seed=5),
]


def alone(model, inputs, **settings) -> list[int]:
    torch.manual_seed(settings.pop("seed", 0))
    settings = {**GREEDY, "max_new_tokens": 6, **settings}
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def submit(batch, inputs, **settings):
    return batch.submit(inputs, **{**GREEDY, "max_new_tokens": 6, **settings})


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


# positions of each kind (rotary, ALiBi, learned), a window, and masks of a model's own
KINDS = ("llama", "otter_mpt", "opt", "gemma3_text", "falcon")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(DECODERS) - set(KINDS))]


@pytest.mark.parametrize("decoder", [*KINDS, *OTHERS])
def test_rows_that_join_and_leave_at_any_step(decoder):
    model = tiny_model(decoder)
    batch = ContinuousBatch(model, prefill_tokens=16)
    rows = []
    for number, inputs in enumerate(PROMPTS):
        rows.append(submit(batch, inputs, max_new_tokens=4 + 3 * (number % 3)))
        for _ in range(number % 3):
            batch.step()
    assert batch.num_running > 1
    batch.run()
    for number, (inputs, answer) in enumerate(zip(PROMPTS, rows, strict=True)):
        assert answer.tokens == alone(model, inputs, max_new_tokens=4 + 3 * (number % 3)), number
        assert answer.finish == "length" and answer.future.result() is answer
    assert (batch.num_running, batch.num_waiting, batch.tokens_taken) == (0, 0, 0)


def test_an_otterhd_and_its_patches():
    processor = otterhd_tiny.tiny_processor()
    model = otterhd_tiny.tiny_model(processor)
    generator = torch.Generator().manual_seed(0)
    questions = []
    for number, patches in enumerate((6, 0, 40, 3)):
        words = torch.randint(10, 90, (1, 4 + 3 * number), generator=generator)
        ids = torch.cat([torch.full((1, patches), model.config.image_token_id), words], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if patches:
            inputs["pixel_values"] = torch.randn(patches, 300, generator=generator)
        questions.append(inputs)
    batch = ContinuousBatch(model, prefill_tokens=16)
    rows = []
    for inputs in questions:
        rows.append(submit(batch, inputs))
        batch.step()
    batch.run()
    assert [answer.tokens for answer in rows] == [alone(model, inputs) for inputs in questions]


def test_settings_of_a_row_are_its_own(llama):
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    settings = [
        {"seed": 3, **sampling},
        {"repetition_penalty": 1.8},
        {"seed": 4, **sampling, "top_k": 0, "no_repeat_ngram_size": 2},
        {"sequence_bias": {(7,): 4.0}},
        {"seed": 5, **sampling},
        {"min_new_tokens": 4, "eos_token_id": list(range(3, 90))},
        {},
    ]
    inputs = [PROMPTS[number % len(PROMPTS)] for number in range(len(settings))]
    expected = [alone(llama, *pair[:1], **pair[1]) for pair in zip(inputs, settings, strict=True)]
    for order in (1, -1):  # and whoever stands beside it
        batch = ContinuousBatch(llama)
        pairs = list(zip(inputs, settings, strict=True))[::order]
        rows = [submit(batch, one, **own) for one, own in pairs]
        batch.run()
        assert [answer.tokens for answer in rows][::order] == expected
    assert rows[1].finish == "stop", "min_new_tokens, then one of its ends"


def test_a_seed_of_ones_own_is_not_needed(llama):
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        batch = ContinuousBatch(llama)
        rows = [submit(batch, PROMPTS[0], do_sample=True, temperature=2.0) for _ in range(2)]
        batch.run()
        drawn.append([answer.tokens for answer in rows])
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_long_prompts_are_read_beside_decoding(llama):
    """Neighbours get a token in each step, and no piece has more tokens or pictures than it may."""
    seen = []
    core = llama.model
    hook = core.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    batch = ContinuousBatch(llama, prefill_tokens=32)
    first = submit(batch, PROMPTS[0], max_new_tokens=20)
    batch.step()
    long = prompt(*range(0, 120, 6), length=150)
    late = submit(batch, long)
    steps = 0
    while not late.tokens:
        said = len(first.tokens)
        batch.step()
        assert len(first.tokens) == said + 1
        steps += 1
    hook.remove()
    batch.run()
    assert steps >= 5 and max(given["input_ids"].numel() for given in seen) <= 32
    media = [given["image_hidden_states"].shape[1] for given in seen if "image_hidden_states" in given]
    assert sum(media) == 21 and max(media) <= 8
    assert late.tokens == alone(llama, long) and first.tokens == alone(llama, PROMPTS[0], max_new_tokens=20)


def test_prompts_of_like_length_are_read_at_once(llama):
    """Little is padded, the first who waits is among those who are read, and all are answered."""
    lengths = [40, 90, 41, 88, 5, 60]
    shapes = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    batch = ContinuousBatch(llama, prefill_tokens=200)
    rows = [submit(batch, prompt(length=length, seed=length), max_new_tokens=2) for length in lengths]
    batch.run()
    hook.remove()
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 40), (2, 89), (1, 4), (1, 59)]
    expected = [alone(llama, prompt(length=length, seed=length), max_new_tokens=2) for length in lengths]
    assert [answer.tokens for answer in rows] == expected


def test_the_budget_holds_and_nobody_overtakes(llama):
    batch = ContinuousBatch(llama, token_budget=96, max_rows=3)
    order = []
    rows = [submit(batch, PROMPTS[i % 5], max_new_tokens=2 + i % 3) for i in range(8)]
    while batch.step():
        assert batch.tokens_taken <= 96 and batch.num_running <= 3
        order += [i for i, answer in enumerate(rows) if answer.tokens and i not in order]
    assert order == sorted(order)
    assert [answer.tokens for answer in rows] == [
        alone(llama, PROMPTS[i % 5], max_new_tokens=2 + i % 3) for i in range(8)
    ]
    with pytest.raises(ValueError, match="The prompt has 30 tokens and asks for 67 more, together above the 96"):
        submit(batch, PROMPTS[2], max_new_tokens=67)
    assert not batch.has_work


def test_who_leaves_frees_the_row_at_the_next_step(llama):
    batch = ContinuousBatch(llama, prefill_tokens=8, max_rows=2)
    gone = set()
    rows = [submit(batch, PROMPTS[i], max_new_tokens=20, is_cancelled=lambda i=i: i in gone) for i in (0, 1, 2, 3)]
    while batch.num_running < 2:
        batch.step()
    gone |= {0, 3}  # one is running, one waits
    batch.step()
    assert [answer.finish for answer in rows] == ["cancelled", None, None, "cancelled"]
    assert batch.num_running == 1 and batch.num_waiting == 1, "the third is being read"
    gone.add(2)
    batch.step()
    assert rows[2].finish == "cancelled" and batch.num_waiting == 0
    batch.run()
    assert rows[1].tokens == alone(llama, PROMPTS[1], max_new_tokens=20)


def test_on_token_ends_a_row(llama):
    expected = alone(llama, PROMPTS[0])
    heard = []

    def listen(token: int) -> bool:
        heard.append(token)
        return len(heard) == 3

    batch = ContinuousBatch(llama)
    stopped, other = submit(batch, PROMPTS[0], on_token=listen), submit(batch, PROMPTS[1])
    batch.run()
    assert stopped.tokens == heard == expected[:3] and stopped.finish == "stop"
    assert other.tokens == alone(llama, PROMPTS[1])


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise RuntimeError("a processor of one's own")


def test_what_fails_costs_only_itself(llama):
    def hang_up(token):
        raise OSError("nobody listens")

    batch = ContinuousBatch(llama)
    tower = llama.model.vision_tower.register_forward_pre_hook(
        lambda module, args: 1 / 0 if (args[0] > 90).any() else None
    )
    poisoned = {**PROMPTS[0], "pixel_values": torch.full((1, 1, 1, 3, 16, 16), 99.0)}
    bad = [
        submit(batch, PROMPTS[1], on_token=hang_up),
        submit(batch, poisoned),
        submit(batch, PROMPTS[1], logits_processor=[Failing()]),
    ]
    good = [submit(batch, inputs) for inputs in PROMPTS]
    batch.run()
    tower.remove()
    assert [type(answer.error) for answer in bad] == [OSError, ZeroDivisionError, RuntimeError]
    with pytest.raises(OSError, match="nobody listens"):
        bad[0].future.result()
    assert [answer.tokens for answer in good] == [alone(llama, inputs) for inputs in PROMPTS]


def test_a_step_that_fails_ends_its_rows_and_no_others(llama):
    batch = ContinuousBatch(llama, max_rows=1)
    first, second = submit(batch, PROMPTS[0]), submit(batch, PROMPTS[1])
    batch.step()
    hook = llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    batch.step()
    hook.remove()
    batch.run()
    assert isinstance(first.error, ZeroDivisionError) and second.tokens == alone(llama, PROMPTS[1])


def test_a_step_that_fails_leaves_alone_who_is_being_read(llama):
    batch = ContinuousBatch(llama, prefill_tokens=4)
    first = submit(batch, PROMPTS[4])
    batch.step()
    second = submit(batch, PROMPTS[2])
    batch.step()
    assert len(first.tokens) == 2 and batch.num_waiting == 1
    hook = llama.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    batch.step()
    hook.remove()
    assert isinstance(first.error, ZeroDivisionError) and second.finish is None
    batch.run()
    assert second.tokens == alone(llama, PROMPTS[2])


def test_who_cannot_join_is_told_and_nobody_waits_for_ever(llama, monkeypatch):
    """Memory for the rows of a batch may be missing: those that have it end, then who still finds none."""
    batch = ContinuousBatch(llama)
    first = submit(batch, PROMPTS[0])
    batch.step()
    joining = [submit(batch, PROMPTS[1]), submit(batch, PROMPTS[0])]

    def run_out(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("otter_hf.models.batch_cache.BatchCache.add", run_out)
        batch.step()
        assert isinstance(first.error, torch.OutOfMemoryError)
        assert [row.finish for row in joining] == [None, None]
        batch.run()
    assert all(isinstance(row.error, torch.OutOfMemoryError) for row in joining) and not batch.has_work
    # and who finds memory when they have left
    first, second = submit(batch, PROMPTS[0]), submit(batch, PROMPTS[1])
    batch.run()
    assert [first.tokens, second.tokens] == [alone(llama, inputs) for inputs in PROMPTS[:2]]


@pytest.mark.parametrize("steps", [0, 1])
def test_an_error_holds_no_states(llama, steps):
    """Reading a prompt and decoding: where memory ran out, none of it may stay with whoever keeps the answer."""
    batch, states = ContinuousBatch(llama), []
    answer = submit(batch, PROMPTS[0])
    for _ in range(steps):
        batch.step()

    def run_out(module, args):
        states.append(weakref.ref(args[0]))
        raise torch.OutOfMemoryError("no memory")

    hook = llama.model.decoder_layers[-1].register_forward_pre_hook(run_out)
    collects = gc.isenabled()
    gc.disable()
    try:
        batch.run()
        assert isinstance(answer.error, torch.OutOfMemoryError)
        assert len(states) == 1 and states[0]() is None
    finally:
        hook.remove()
        if collects:
            gc.enable()


@pytest.mark.parametrize("decoder", ["llama", "otter_mpt", "gemma3_text"])
def test_a_prefix_is_read_once(decoder):
    """Two rows behind a prefix with pictures, one of them without a picture of its own; the prefix stays as it is."""
    model = tiny_model(decoder)
    head = row(0, 6, length=12, seed=8)
    pixels = images(1, 3, seed=8)
    cache = compute_prefix(model, {"input_ids": head, "pixel_values": pixels[:, :2]})
    whole = [
        {"input_ids": torch.cat([head, row(0, length=7, seed=9)], dim=1), "pixel_values": pixels},
        {"input_ids": torch.cat([head, row(length=3, seed=10)], dim=1), "pixel_values": pixels[:, :2]},
        {"input_ids": torch.cat([head, row(length=1, seed=11)], dim=1), "pixel_values": pixels[:, :2]},
        {"input_ids": torch.cat([head, row(0, length=1, seed=11)], dim=1), "pixel_values": pixels},
    ]
    expected = [alone(model, inputs) for inputs in whole]
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    batch = ContinuousBatch(model)
    rows = [submit(batch, inputs, prefix=cache) for inputs in whole]
    rows.append(submit(batch, {**whole[0], "pixel_values": pixels[:, 2:]}, prefix=cache))
    batch.step()
    hook.remove()
    batch.run()
    assert read == [(4, 6), (4, 1)], "all behind the prefix at once, but for the last tokens and who ends in a picture"
    assert [answer.tokens for answer in rows] == [*expected, expected[0]]
    assert cache.get_seq_length() == 12 and cache.num_media == 2


def test_pictures_that_come_again_are_encoded_once(llama):
    batch = ContinuousBatch(llama)
    latents = llama.get_image_features(PROMPTS[0]["pixel_values"][0]).pooler_output[None]
    rows = [submit(batch, PROMPTS[0]) for _ in range(3)]
    rows.append(submit(batch, {"input_ids": PROMPTS[0]["input_ids"], "image_hidden_states": latents}))
    batch.run()
    assert batch.media_store.misses == 1
    assert {tuple(answer.tokens) for answer in rows} == {tuple(alone(llama, PROMPTS[0]))}


def test_frames_of_films_and_padding(llama):
    """Films of different length; what the mask leaves out is no medium."""
    films = images(1, 3, frames=3, seed=2)
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0], [0, 0, 0]]])
    inputs = {"input_ids": row(0, 4), "pixel_values": films, "pixel_attention_mask": mask}
    batch = ContinuousBatch(llama)
    rows = [submit(batch, inputs), submit(batch, PROMPTS[0])]
    batch.run()
    assert [answer.tokens for answer in rows] == [alone(llama, inputs), alone(llama, PROMPTS[0])]


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({"pixel_values": images(1, 2)}, {}, "The prompt has 1 `<image>`.*but inputs hold 2 media"),
        ({"pixel_values": None}, {}, "hold 0 media"),
        ({"input_ids": torch.full((2, 5), 7)}, {}, "submit rows one by one"),
        ({"attention_mask": torch.tensor([[0] + [1] * 8])}, {}, "without padding"),
        ({"media_index": torch.ones(1, 9)}, {}, "inputs hold media_index"),
        ({"input_ids": torch.tensor([[IMAGE]])}, {}, "it must leave one that is no picture"),
        ({}, {"num_beams": 2}, "use generate for beams"),
        ({}, {"stop_strings": ["a"]}, "stop_strings"),
        ({}, {"max_time": 1.0}, "max_time"),
        ({}, {"temprature": 1.0}, "temprature is nothing that a batch"),
        ({}, {"max_new_tokens": None, "max_length": 9}, "max_length leaves none to answer"),
    ],
)
def test_what_is_refused(changed, settings, message, llama):
    batch = ContinuousBatch(llama)
    with pytest.raises(ValueError, match=message):
        submit(batch, {**PROMPTS[0], **changed}, **settings)
    assert not batch.has_work


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear has no continuous batching"):
        ContinuousBatch(torch.nn.Linear(1, 1))


def test_a_generation_config_is_that_of_generate(llama):
    config = GenerationConfig(max_new_tokens=4, eos_token_id=-1, do_sample=False)
    batch = ContinuousBatch(llama)
    answer = batch.submit(PROMPTS[0], config)
    batch.run()
    assert answer.tokens == alone(llama, PROMPTS[0], max_new_tokens=4)


def test_a_fault_of_nobody_s_ends_the_rows_and_later_ones_are_answered(llama):
    batch = ContinuousBatch(llama, prefill_tokens=4)
    rows = [submit(batch, inputs) for inputs in PROMPTS]
    while not batch.num_running:
        batch.step()
    batch.fail(RuntimeError("the device is gone"))
    assert {row.finish for row in rows} == {"error"} and not batch.has_work
    assert all(str(row.error) == "the device is gone" for row in rows)
    again = submit(batch, PROMPTS[0])
    batch.run()
    assert again.tokens == alone(llama, PROMPTS[0])


def test_the_thread_outlives_a_step_that_fails(llama, monkeypatch):
    batch = ContinuousBatch(llama)
    thread = BatchThread(batch)

    def step():
        monkeypatch.undo()
        raise RuntimeError("nobody foresaw it")

    monkeypatch.setattr(batch, "step", step)
    settings = {**GREEDY, "max_new_tokens": 6}
    with pytest.raises(RuntimeError, match="nobody foresaw it"):
        thread.submit(PROMPTS[0], **settings).future.result(60)
    assert thread.submit(PROMPTS[0], **settings).future.result(60).tokens == alone(llama, PROMPTS[0])
