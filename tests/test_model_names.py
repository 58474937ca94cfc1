"""What is given as a model: one check, with its own sentence for each way of being none."""

import json

import pytest
from hub_double import HubDouble, Repository, StoredFile
from huggingface_hub import constants

from otter_hf.cli import main
from otter_hf.loading import load_processor
from otter_hf.model_names import check_model_name, split_revision


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder: a model without weights, one with, a training folder, a folder of 2023."""
    monkeypatch.chdir(tmp_path)
    folders = ("bare", "runs/checkpoint-9", "runs/checkpoint-10", "sharded", "trained", "empty", "of2023")
    for folder in ("out/demo/model", *folders):
        (tmp_path / folder).mkdir(parents=True)
        if folder not in ("empty", "of2023"):
            (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "out/demo/model/model.safetensors").write_bytes(b"")
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (tmp_path / "sharded/model-1.safetensors").write_bytes(b"")
    (tmp_path / "of2023/checkpoint.pt").write_bytes(b"")
    for name in ("trainable.json", "trainable.safetensors"):
        (tmp_path / "trained" / name).write_bytes(b"")
    return tmp_path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubDouble() as hub:
        file = {"config.json": StoredFile(b"{}")}
        for name, files in (("lab/otter", file), ("lab/flamingo", {}), ("lab/tokenizer", {})):
            hub.repositories[name] = Repository(name)
            hub.repositories[name].commit(files, "first")
        on_the_hub(monkeypatch, hub.url, tmp_path)
        yield hub


def on_the_hub(monkeypatch, url: str, cache) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./out/demo/modle", r"neither a folder here nor a Hub id \(owner/name\); did you mean 'out/demo/model'\?"),
        ("out/dmeo/model", r"is neither a folder .*; did you mean 'out/demo/model'\?"),
        ("a b/c", "neither a folder here nor a Hub id"),
        ("out/demo/model/config.json", "is a file; give the folder with config.json"),
        ("bare", r"has a config.json but no weights \(\*.safetensors\)"),
        ("trained", "holds the trained weights alone: .* with otter_hf.training.load_trainable"),
        ("sharded", "lacks model-2.safetensors, one of 2 files of weights that model.safetensors.index.json names"),
        ("runs", "holds no config.json, but 'runs/checkpoint-10' does: give that"),
        ("out/demo", "holds no config.json, but 'out/demo/model' does: give that"),
        ("empty", "holds no config.json, but nothing at all"),
        ("of2023", "holds no config.json, but checkpoint.pt: make a folder of it with `otter-hf convert`"),
    ],
)
def test_folders(here, name, message):
    with pytest.raises(ValueError, match=message) as error:
        check_model_name(name, weights=True)
    assert str(error.value).startswith(f"model {name!r} ")


def test_an_index_of_files_that_nobody_reads(here):
    """As `hf download --exclude "*.bin"` leaves it of a repository with both kinds of weights."""
    (here / "sharded/model-2.safetensors").write_bytes(b"")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (here / f"sharded/{name}.index.json").write_text(json.dumps({"weight_map": {"a": f"1-of-2-{name}"}}))
    check_model_name("sharded", weights=True)


def test_what_is_a_model(here):
    check_model_name("out/demo/model", weights=True)
    check_model_name("bare")
    check_model_name("empty", config=False)
    check_model_name("lab/otter", ask_hub=False)
    (here / "bare/adapter_config.json").write_text("{}")
    check_model_name("bare", weights=True)
    assert split_revision("lab/otter@v2") == ("lab/otter", "v2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/oter", "neither a folder here nor on the Hub; if it is private, `hf auth login`"),
        ("demo/model", r"neither a folder here nor on the Hub.*; did you mean 'out/demo/model'\?"),
        ("lab/otter@v2", "is on the Hub, but its revision 'v2' is not"),
        ("lab/flamingo", "holds no config.json: make a folder of its checkpoint.pt with `otter-hf convert openflam"),
    ],
)
def test_names_of_the_hub(here, hub, name, message):
    with pytest.raises(ValueError, match=message):
        check_model_name(name)
    check_model_name("lab/otter")
    check_model_name("lab/tokenizer", config=False)


def test_a_hub_that_is_out_of_order(here, hub):
    hub.fail("HEAD", "/lab/otter", status=503, times=9)
    with pytest.raises(ValueError, match="answers with status 503: try again later"):
        check_model_name("lab/otter")


def test_without_network(here, monkeypatch):
    """A closed port answers like a machine without network: at once, and once."""
    monkeypatch.setenv("HTTP_PROXY", "")
    on_the_hub(monkeypatch, "http://127.0.0.1:1", here)
    with pytest.raises(ValueError, match=r"the Hub \(http://127.0.0.1:1\) cannot be reached"):
        check_model_name("lab/otter")
    # what was downloaded needs none
    cached = here / "cache/models--lab--otter"
    (cached / "snapshots/1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("1")
    (cached / "snapshots/1/config.json").write_text("{}")
    check_model_name("lab/otter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="was not downloaded before, and HF_HUB_OFFLINE forbids to ask the Hub"):
        check_model_name("lab/other")


@pytest.mark.parametrize(
    "words",
    [
        "chat NAME",
        "serve NAME",
        "demo NAME",
        "memory NAME",
        "eval eval.yaml",
        "convert dtype --source NAME --output new",
        "convert lora --source bare --tokenizer NAME --output new",
        "data show mixture.yaml --processor NAME",
        "data stats mixture.yaml --tokenizer NAME",
        "train --model_name_or_path NAME --train_mixture t.yaml --output_dir new --use_cpu True",
    ],
)
def test_every_command_says_the_same(words, here, monkeypatch, capsys):
    (here / "eval.yaml").write_text("models: [{name: otter, path: demo/modle}]\ndatasets: [{name: mme}]\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words.replace("NAME", "demo/modle").split()) == 2
    error = capsys.readouterr().err
    assert "'demo/modle' is no folder here and was not downloaded before, and HF_HUB_OFFLINE forbids" in error
    assert not (here / "new").exists()


def test_python_says_the_same(here):
    with pytest.raises(ValueError, match="'bar' is no folder here.*; did you mean 'bare'"):
        load_processor("bar")
