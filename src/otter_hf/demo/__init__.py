"""A web page to talk to a model: a client of `otter_hf.serving` or of any server with OpenAI's chat completions."""
