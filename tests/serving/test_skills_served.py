"""Skills and shared beginnings of prompts in the server: the same answers, read once."""

import pytest
from serving_double import image_url

from otter_hf.cli.serve import named_skills
from otter_hf.loading import load
from otter_hf.models.skills import Skill


openai = pytest.importorskip("openai", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")

BEAMS = {"generation_config": '{"num_beams": 2}'}


def said(answer) -> str:
    return answer.choices[0].message.content


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("family", ["otter", pytest.param("otterhd", marks=pytest.mark.slow)])
def test_a_skill_is_a_model_of_its_own_name(family, folders, serve, pictures, tmp_path):
    picture = {"type": "image", "image": pictures[0]}
    examples = [
        {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    path = tmp_path / "colors.safetensors"
    Skill.compile(*load(folders[family], device_map="cpu"), examples).save(path)
    name = f"{folders[family]}:colors"
    server = serve(folders[family], skills={name: (folders[family], path)}, prefix_bytes=0)
    assert [model.id for model in server.client().models.list()] == [folders[family], name]
    whole = [
        {"role": "user", "content": [image_url(pictures[0]), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [image_url(pictures[1]), {"type": "text", "text": "and this?"}]},
    ]
    for options in ({}, {"extra_body": BEAMS}):
        plain, given = (
            server.client().chat.completions.create(
                model=model, messages=messages, max_tokens=6, temperature=0, **options
            )
            for model, messages in ((folders[family], whole), (name, whole[2:]))
        )
        assert said(given) == said(plain) and given.model == name
        assert given.usage.prompt_tokens == plain.usage.prompt_tokens
        assert cached(plain) == 0 and 0 < cached(given) < given.usage.prompt_tokens
    with pytest.raises(openai.NotFoundError, match="colors"):
        server.ask(model=f"{folders[family]}:shapes")


def test_a_skill_of_another_model_ends_the_start(folders, tmp_path):
    from otter_hf.serving.models import ServedModels

    model, processor = load(folders["otter"], device_map="cpu")
    path = tmp_path / "colors.safetensors"
    Skill.compile(model, processor, [{"role": "system", "content": "Be brief."}]).save(path)
    with pytest.raises(ValueError, match="is a skill of another model"):
        ServedModels([folders["flamingo"]], skills={"a:b": (folders["flamingo"], path)}, device_map="cpu")
    with pytest.raises(FileNotFoundError, match="There is no skill"):
        ServedModels([folders["otter"]], skills={"a:b": (folders["otter"], tmp_path / "none")}, device_map="cpu")


def test_what_prompts_begin_with_is_found(folders, serve, pictures):
    server = serve(folders["otter"])
    text = "look at it closely, and say in a word what it is: "

    def ask(end: str, number: int):
        return server.ask(text + end, image_url(pictures[number]))

    alone = {end: said(ask(end, 1)) for end in ("a?", "b?", "c?")}
    fresh = serve(folders["otter"], prefix_bytes=0)
    assert cached(fresh.ask("hm")) == 0
    for end, answer in alone.items():
        assert said(fresh.ask(text + end, image_url(pictures[1]))) == answer
    # the same words about another picture begin otherwise
    known = [cached(ask("a?", number)) for number in (1, 2, 2, 1)]
    assert known[0] > len(text) and known[1] == 0 and known[2] > len(text) and known[3] >= known[0]


def test_names_of_skills():
    assert named_skills(["out/a"], ["x/colors.safetensors"])["out/a:colors"][0] == "out/a"
    assert list(named_skills(["a", "b"], ["b=c.safetensors"])) == ["b:c"]
    with pytest.raises(ValueError, match="say of which model it is, --skill MODEL=c"):
        named_skills(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="there is a a:c already"):
        named_skills(["a"], ["c.safetensors", "d/c.safetensors"])
