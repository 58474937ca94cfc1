"""`otter-hf demo`: a web page to talk to a model."""

import argparse
import contextlib
import os
import secrets

from ..extras import missing
from ..model_names import check_model_name
from .chat import loading_options
from .serve import API_KEY_VARIABLE, add_server_arguments, check_port, named_skills, require_serving, settings_from


def add_parser(subparsers):
    """Add the `demo` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="a web page to talk to a model",
        description="A web page to talk to models about pictures and videos: models of this process, or with --url "
        f"those of a server with OpenAI's API, whose key is in the environment variable {API_KEY_VARIABLE}.",
    )
    parser.add_argument("models", nargs="*", help="folders or Hub ids")
    parser.add_argument("--url", help="of a running server, e.g. http://localhost:8000/v1, in place of models")
    parser.add_argument("--flag-folder", default="logs/flagged", help="of rated conversations (default: logs/flagged)")
    add_server_arguments(parser, port=7861)
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> None:
    """Show the page until the process is told to end."""
    if bool(arguments.url) == bool(arguments.models):
        raise ValueError("Give models, or the --url of a server that has them.")
    if arguments.url and arguments.skill:
        raise ValueError("--skill is for models of this process: give it to the server at --url.")
    for name in arguments.models:
        check_model_name(name, weights=True)
    require_serving()
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(missing("the page", "demo")) from error
    import openai

    from ..demo.page import CSS, THEME, build_page

    check_port(arguments.host, arguments.port)
    with contextlib.ExitStack() as stack:
        url, key = arguments.url, os.environ.get(API_KEY_VARIABLE) or "none"
        if arguments.models:
            url, key = stack.enter_context(serve_in_process(arguments))
        try:
            page = build_page(openai.OpenAI(base_url=url, api_key=key), arguments.flag_folder)
        except openai.APIError as error:
            raise ValueError(f"the server at {url} does not list its models: {error}") from error
        page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            theme=THEME,
            css=CSS,
            max_file_size=settings_from(arguments).body_bytes,
            footer_links=[],
        )


@contextlib.contextmanager
def serve_in_process(arguments: argparse.Namespace):
    """URL and key of a server for `arguments.models`, which only this process knows."""
    from dataclasses import replace

    from ..serving.app import create_app
    from ..serving.background import BackgroundServer
    from ..serving.models import ServedModels

    settings = replace(settings_from(arguments), api_key=secrets.token_urlsafe(32))
    models = ServedModels(
        arguments.models,
        skills=named_skills(arguments.models, arguments.skill),
        model_timeout=arguments.model_timeout,
        **loading_options(arguments),
    )
    with BackgroundServer(create_app(models, settings)) as server:
        yield f"{server.url}/v1", settings.api_key
