"""Several answers to a request, and how likely their tokens were."""

from types import SimpleNamespace

import pytest
import torch
from serving_double import image_url

from otter_hf.models.generation import end_tokens
from otter_hf.serving.logprobs import TokenLogprobs
from otter_hf.testing.otterhd import tiny_processor


openai = pytest.importorskip("openai", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")


def texts(completion) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.message.content for choice in completion.choices]


def joined(stream) -> tuple[dict[int, str], dict[int, list], dict[int, str], list]:
    """Of each answer of a stream its text, tokens and end; and the numbers of tokens."""
    said, told, ends, usage = {}, {}, {}, []
    for chunk in stream:
        usage += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
            told.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return said, told, ends, usage


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_each_of_several_answers_is_one_asked_alone(family, folders, serve, pictures):
    """The n-th has the n-th seed; the prompt is read for all, and counted once."""
    server = serve(folders[family])
    asked = {"temperature": 1.5, "max_tokens": 12}
    question = ("what about this picture, and that one there?", *map(image_url, pictures[:2]))
    alone = [server.ask(*question, seed=seed, **asked) for seed in (7, 8, 9)]
    for options in ({}, {"stop": texts(alone[0])[0][3:5]}):
        several = server.ask(*question, seed=7, n=3, **asked, **options)
        stop = options.get("stop", "\0")
        expected = [texts(one)[0].split(stop)[0].rstrip() for one in alone]
        assert texts(several) == expected and len(set(expected)) == 3
        said, _, ends, usage = joined(server.ask(*question, seed=7, n=3, stream=True, **asked, **options))
        assert [said[number] for number in range(3)] == expected
        assert [ends[number] for number in range(3)] == [choice.finish_reason for choice in several.choices]
        (numbers,) = usage
        assert numbers.completion_tokens == several.usage.completion_tokens
        assert numbers.prompt_tokens == several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens <= sum(one.usage.completion_tokens for one in alone)
    assert texts(server.ask(*question, n=2)) == texts(server.ask(*question)) * 2
    assert (server.gate.admitted, server.gate.running) == (0, 0)


def test_what_fails_in_one_answer_ends_all(folders, serve):
    server = serve(folders["otter"])
    hook = server.model_of().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        server.ask(n=3)
    hook.remove()
    assert len(texts(server.ask(n=3))) == 3 and server.gate.admitted == 0


@pytest.mark.parametrize("family", ["otter", "otterhd"])
def test_logprobs_are_those_of_the_model(family, folders, serve, pictures):
    server = serve(folders[family])
    model, processor = server.model_of(), server.processor_of()
    question = ("what?", image_url(pictures[0]))
    whole = server.ask(*question, logprobs=True, top_logprobs=3, max_tokens=8)
    (choice,) = whole.choices
    told = choice.logprobs.content
    if family == "otter":  # to OtterHD's tokenizer bytes that are no text spoil the letters in front of them
        data = bytes(byte for token in told for byte in token.bytes)
        assert data.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}").strip() == choice.message.content
    for token in told:
        best = [other.logprob for other in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, best[0]), "greedy"
    # the tokens behind the prompt, read by the model at once
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=8, output_scores=True, return_dict_in_generate=True)
    scores = torch.stack(output.scores).log_softmax(-1)[: len(told), 0]
    assert [token.logprob for token in told] == pytest.approx(scores.max(dim=-1).values.tolist(), abs=1e-4)
    # of a stream, of several answers, and of one that is drawn
    streamed = joined(server.ask(*question, logprobs=True, top_logprobs=3, max_tokens=8, stream=True))[1][0]
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in told]
    drawn = server.ask(*question, logprobs=True, n=2, seed=1, temperature=1.5, max_tokens=8)
    for choice in drawn.choices:
        assert 0 < len(choice.logprobs.content) <= 8 and not choice.logprobs.content[0].top_logprobs
        assert all(token.logprob < 0 for token in choice.logprobs.content)
    assert server.ask(*question).choices[0].logprobs is None


def test_generate_tells_the_same(model, processor):
    """What a batch does not have is answered by `generate`, which does not say which token it chose."""
    inputs = processor(text=["User:what? GPT:<answer>"], return_tensors="pt")
    for options in ({}, {"do_sample": True, "temperature": 2.0}):
        ends = end_tokens(model.generation_config)
        recorder = TokenLogprobs(processor.tokenizer, 1, ends)
        output = model.generate(
            **inputs,
            max_new_tokens=6,
            logits_processor=[recorder],
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        recorder.take(new[-1])
        told = recorder.new()
        likely = [token for token in new if token not in ends]
        assert len(told) == len(likely) and not recorder.new()
        for token, logits, one in zip(likely, output.logits, told, strict=False):
            above = one["logprob"] - float(logits.log_softmax(-1)[0, token])
            assert -1e-4 < above < 0.2, "the share of tokens that are never chosen"


def test_bytes_of_tokens(processor):
    in_python = TokenLogprobs(
        SimpleNamespace(convert_ids_to_tokens=["\N{LOWER ONE EIGHTH BLOCK}a"].__getitem__), 0, ()
    )
    assert in_python._bytes_of(0) == b" a"
    text = "what a día: 猫, 🦦!"
    for tokenizer in (processor.tokenizer, tiny_processor().tokenizer):
        recorder = TokenLogprobs(tokenizer, 0, ())
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(recorder._bytes_of, ids)).decode().strip() == text
