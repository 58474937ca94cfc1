"""Tiny models on disk and a server for one of them."""

import pytest
from serving_double import Server, write_models


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny Otter, Flamingo and OtterHD."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def server(folders):
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    pytest.importorskip("openai", reason="the serve extra is not installed")
    server = Server([folders["otter"]])
    tokenizer = server.models.load_model_and_processor(f"{folders['otter']}@main")[1].tokenizer
    generation = server.model_of().generation_config
    # letters, which can be streamed one by one, and long answers, so that there is something to stop
    generation.suppress_tokens = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isalpha()]
    generation.eos_token_id = None
    yield server
    server.stop()
