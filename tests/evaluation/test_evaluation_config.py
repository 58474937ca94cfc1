"""The two forms of configuration."""

from pathlib import Path

import pytest
import yaml
from benchmark_rows import RED

from otter_hf.evaluation.config import FEWSHOT, TASKS, load_config


@pytest.fixture
def load(tmp_path):
    def read(config):
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return load_config(path)

    return read


def test_the_form_of_2023(load):
    config = load(
        {
            "models": [
                {"name": "otter_image", "load_bit": "bf16"},
                {"name": "otterhd", "model_path": "here/otterhd", "cuda_id": 1, "resolution": 512},
                {"name": "fuyu"},
                {"name": "idefics", "batch": 8},
                {"name": "gpt4v"},
            ],
            "datasets": [
                {"name": "magnifierbench", "prompt": "Answer.", "default_output_path": "./logs", "debug": True},
                {"name": "mmvet", "gpt_model": "gpt-4-0613", "num_run": 5},
                {"name": "mmbench", "data_path": "Otter-AI/MMBench", "split": "dev"},
                {"name": "mathvista", "data_path": "Otter-AI/MathVista"},
            ],
            "output": "./logs/evaluation.txt",
        }
    )
    otter, otterhd, fuyu, idefics, gpt4v = config.models
    assert otter.path == "luodian/OTTER-Image-MPT7B" and otter.options["dtype"] == "bfloat16"
    assert otter.options["generation"] == {"max_new_tokens": 512, "num_beams": 3, "no_repeat_ngram_size": 3}
    assert otterhd.path == "here/otterhd" and otterhd.options["device"] == "cuda:1"
    assert otterhd.options["processor_kwargs"] == {"resolution": 512}
    assert fuyu.path == "adept/fuyu-8b" and "User:" not in fuyu.options["chat_template"]
    assert idefics.batch_size == 8
    assert gpt4v.path is None and gpt4v.model == "gpt-4-vision-preview"
    magnifierbench, mmvet, mmbench, mathvista = config.datasets
    assert (magnifierbench.split, mmbench.split, mathvista.split) == (None, "validation", "test")
    # debug meant to save the replies, which are saved anyway
    assert magnifierbench.prompts == {"prompt": "Answer."} and magnifierbench.limit is None
    assert mmvet.judge == "gpt-4-0613" and mmvet.options == {"num_run": 5}
    assert str(config.output) == "logs/evaluation"


def test_prompts_of_2023_to_the_byte(load):
    """Under its name of 2023 OtterHD is asked with a space that its training did not have; by its path without."""
    from otter_hf.testing.otterhd import tiny_processor

    hd, plain = load({"models": [{"name": "otterhd"}, {"name": "mine", "path": "a/b"}], "datasets": ["mme"]}).models
    question = [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    messages = [{"role": "user", "content": question}, answer, {"role": "user", "content": question[1:]}]
    processor = tiny_processor()
    for model, expected in ((hd, "User: What? Assistant:\x04"), (plain, "User:What? Assistant:\x04")):
        template = {key: value for key, value in model.options.items() if key == "chat_template"}
        for asked, prompt in ((messages[:1], expected), (messages, f"{expected} Red.{expected}")):
            inputs = processor.apply_chat_template(
                [asked], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **template
            )
            assert processor.tokenizer.decode(inputs["input_ids"][0]).endswith(f"<s> {prompt}")


def test_the_plain_form(load):
    config = load(
        """
        models:
          - some/model
          - {path: out/model, name: mine, batch_size: 4, generation: {num_beams: 2}, dtype: null}
          - {path: of/2023, tokenizer_reference: 4.28}
          - {endpoint: "http://localhost:8000/v1", model: served, max_new_tokens: 4096}
        datasets: [mme, {name: coco, train: a.parquet, test: b.parquet, shots: [0, 4]}, textvqa_val]
        limit: 100
        judge: {model: gpt-5, max_retries: 1, options: {reasoning_effort: low}}
        """
    )
    first, mine, of_2023, served = config.models
    assert of_2023.options == {"tokenizer_reference": "4.28"}, "a number to YAML"
    assert (first.name, first.path, first.options) == ("model", "some/model", {})
    assert mine.batch_size == 4 and mine.options == {"generation": {"num_beams": 2}}
    assert served.name == "served" and served.endpoint == "http://localhost:8000/v1"
    assert served.options == {"generation": {"max_new_tokens": 4096}}
    mme, coco, builtin = config.datasets
    assert mme.tasks == ("otter_mme",) and mme.limit == 100 and mme.judge == "gpt-5"
    assert coco.fewshot["shots"] == [0, 4] and coco.fewshot["num_samples"] == 100
    assert builtin.tasks == ("textvqa_val",)
    assert config.judge_retries == 1 and config.judge_options == {"reasoning_effort": "low"}


def test_results_of_a_folder_have_its_name(load):
    (model,) = load({"models": [".."], "datasets": ["mme"]}).models
    assert model.name == Path("..").resolve().name and model.path == ".."


MODELS = {"models": ["a/b"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("- a", "must hold `models:` and `datasets:`"),
        ("models: [", "is not YAML"),
        ({"models": []}, "`models` must be a list"),
        ({**MODELS, "datasets": ["mme"], "output_dir": "x"}, "unknown key `output_dir`"),
        ({**MODELS, "datasets": [{"name": "mme", "api_key": "sk-1"}]}, "set OPENAI_API_KEY"),
        ({"models": [{"name": "gpt4v", "api_key": "sk-1"}], "datasets": ["mme"]}, "set OPENAI_API_KEY"),
        ({**MODELS, "datasets": [{"name": "mme", "splits": "x"}]}, "unknown key `splits`"),
        ({**MODELS, "datasets": [{"split": "x"}]}, "needs a `name`"),
        ({"models": [{"path": "a", "generation": {"num_beam": 3}}], "datasets": ["mme"]}, "unknown key `num_beam`"),
        (
            {"models": [{"path": "a", "generation": {"top_p": 0.9}}], "datasets": ["mme"]},
            "top_p 0.9, which is",
        ),
        (
            {"models": [{"path": "a", "generation": {"temperature": 0.7, "do_sample": False}}], "datasets": ["mme"]},
            "has temperature 0.7, which samples, and `do_sample: false`",
        ),
        ({"models": ["a/m:1", {"path": "b", "name": "m_1"}], "datasets": ["mme"]}, "Two models are called 'm:1'"),
        (
            {"models": [{"path": "a", "dtype": "int8"}], "datasets": ["mme"]},
            "dtype 'int8'; use auto, bfloat16, float16",
        ),
        (
            {"models": [{"path": "a", "model_path": "b"}], "datasets": ["mme"]},
            "A model has `path` 'a' and `model_path` 'b': give one of them",
        ),
        (
            {"models": [{"path": "a", "max_new_tokens": 5, "generation": {"max_new_tokens": 6}}], "datasets": ["mme"]},
            "has `max_new_tokens` 5, and another in `generation`",
        ),
        ({"models": [{"path": "a", "media_store_gb": 3}], "datasets": ["mme"]}, "`media_store_gb` bounds a"),
        (
            {"models": [{"path": "a", "media_store": "b", "media_store_gb": -1}], "datasets": ["mme"]},
            "`media_store_gb` is -1; it must be a number from 0 on",
        ),
        ({**MODELS, "datasets": ["mme", "mme"]}, "Two datasets are called 'mme'"),
        ({**MODELS, "datasets": [{"name": "coco", "train": "x"}]}, "needs `test`"),
        (
            {**MODELS, "datasets": [{"name": "coco", "train": "a", "test": "b", "normaliser": "official"}]},
            "'coco' has `normaliser`, which is for vqav2, ok_vqa, vizwiz, textvqa: take it out",
        ),
        (
            {**MODELS, "datasets": [{"name": "coco", "train": "a", "test": "b", "encoder": "c"}]},
            "rices with an `encoder` (folder or Hub id of a vision encoder); coco has 'random' and 'c'",
        ),
        ({**MODELS, "datasets": [{"name": "textvqa_val", "data_path": "x"}]}, "whose `data_path` is fixed"),
        ({**MODELS, "datasets": [{"name": "seedbench", "likelihood": "max"}]}, "use mean or sum"),
        (
            {**MODELS, "datasets": [{"name": "vqav2", "train": "a", "test": "b", "normaliser": "x"}]},
            "official or evalai",
        ),
        # of other types than they should be
        ({"models": [5], "datasets": ["mme"]}, "a model is 5; write a name, or a mapping of"),
        ({**MODELS, "datasets": [["mme"]]}, "A dataset needs a `name`, e.g. mme; got ['mme']"),
        ({**MODELS, "datasets": ["mme"], "judge": 5}, "`judge` is 5; write a name, or a mapping of max_retries"),
        ({**MODELS, "datasets": ["mme"], "judge": {"max_retries": "x"}}, "`max_retries` is 'x'; it must be a whole"),
        ({**MODELS, "datasets": ["mme"], "limit": 1.5}, "`limit` is 1.5; it must be a whole number from 1 on"),
        ({**MODELS, "datasets": ["mme"], "controls": "no"}, "the configuration has controls 'no'; it must be true or"),
        ({**MODELS, "datasets": [{"name": "mme", "data_path": 5}]}, "the dataset 'mme' has data_path 5; it must be a"),
        ({**MODELS, "datasets": [{"name": "mme", "num_run": 5}]}, "'mme' has `num_run`, which is for mmvet: take it"),
        ({**MODELS, "datasets": [{"name": "mmbench", "prompt": "a"}]}, "`prompt`, which is for magnifierbench, mme,"),
        ({**MODELS, "datasets": [{"name": "mme", "image_dir": "a"}]}, "`image_dir`, which is for the pictures of a"),
        ({**MODELS, "datasets": [{"name": "mmvet", "num_run": 0}]}, "`num_run` is 0; it must be a whole number"),
        (
            {**MODELS, "datasets": [{"name": "coco", "train": "a", "test": "b", "shots": 4}]},
            "`shots` is 4; it must be",
        ),
        ({**MODELS, "datasets": [{"name": "coco", "train": "a", "test": "b", "seeds": []}]}, "`seeds` is []; it must"),
        (
            {"models": [{"path": "a", "generation": 5}], "datasets": ["mme"]},
            "a model has generation 5; it must be a ma",
        ),
        ({"models": [{"path": "a", "resolution": "big"}], "datasets": ["mme"]}, "`resolution` is 'big'; it must be"),
        ({"models": [{"name": "unheard_of"}], "datasets": ["mme"]}, "needs a `path`"),
        ({"models": [{"name": "video_chat"}], "datasets": ["mme"]}, "not part of this package"),
        ({"models": [{"endpoint": "http://x"}], "datasets": ["mme"]}, "needs `model`"),
        (
            {
                "models": [{"endpoint": "http://x", "model": "m", "resolution": 3, "dtype": "float16"}],
                "datasets": ["mme"],
            },
            "'m' is behind an endpoint, which is not told `dtype`, `resolution`: leave",
        ),
        (
            {"models": [{"name": "gpt4v", "generation": {"num_beams": 3}}], "datasets": ["mme"]},
            "has `num_beams`, which its endpoint is not told: it knows max_new_tokens, temperature, top_p",
        ),
        (
            {"models": [{"path": "a/b", "model": "m"}], "datasets": ["mme"]},
            "a name for an `endpoint`, and a/b is none",
        ),
    ],
)
def test_what_is_wrong_is_named(config, message, load):
    with pytest.raises(ValueError) as error:
        load(config)
    assert message in str(error.value) and "sk-1" not in str(error.value)


def test_names_of_2023_are_all_known():
    of_2023 = {"magnifierbench", "mmbench", "mme", "mathvista", "mmvet", "seedbench", "pope", "scienceqa"}
    assert of_2023 <= TASKS.keys() and not TASKS.keys() & set(FEWSHOT)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "eval").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_examples_are_read(path):
    config = load_config(path)
    assert config.models and all(dataset.tasks or dataset.fewshot for dataset in config.datasets)
