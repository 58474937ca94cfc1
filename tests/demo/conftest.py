"""A server for a tiny model."""

import pytest
from serving_double import Server


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
