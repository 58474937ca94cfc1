"""`otter-hf serve`: models behind OpenAI's chat completions API."""

import argparse
import errno
import os
import socket
from pathlib import Path

from ..extras import missing
from ..model_names import check_model_name
from .chat import add_loading_arguments, loading_options
from .numbers import not_negative, number, positive


API_KEY_VARIABLE = "OTTER_HF_API_KEY"


def add_parser(subparsers):
    """Add the `serve` subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve models over HTTP with OpenAI's chat completions API",
        description="Serve models over HTTP: POST /v1/chat/completions with pictures and videos, streaming or not, "
        f"GET /v1/models, /health and /metrics. The environment variable {API_KEY_VARIABLE} holds the API key.",
    )
    parser.add_argument("models", nargs="+", help="folders or Hub ids; clients call a model by this name")
    add_server_arguments(parser, port=8000)
    parser.set_defaults(func=run)


def port_number(text: str) -> int:
    """For argparse: a port of this machine."""
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{port} is no port, use one from 0 (any free one) to 65535")
    return port


def check_port(host: str, port: int) -> None:
    """Raise ValueError where nothing can listen: models take their time to load, and would be loaded for nothing."""
    try:
        problems = [_problem_of(*found) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:  # of a name that is none
        problems = [error]
    if None in problems:
        # localhost has an address of IPv6 also where there is none, which servers pass over
        absent = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        problems = [problem for problem in problems if problem is not None and problem.errno not in absent]
    if problems:
        raise ValueError(
            f"Nothing can listen at {host}:{port} ({problems[0].strerror}): give another --port or --host."
        )


def _problem_of(family: int, kind: int, protocol: int, name: str, address: tuple) -> OSError | None:
    """What is wrong with listening at an address that `socket.getaddrinfo` gave."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def add_server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Where it listens, how models are loaded, and what `ServerSettings` holds, whose defaults are its own."""
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all addresses (default: 127.0.0.1)")
    parser.add_argument("--port", type=port_number, default=port, help=f"default: {port}")
    parser.add_argument(
        "--skill",
        action="append",
        default=[],
        metavar="[MODEL=]FILE",
        help="worked examples that `otter-hf skill make` wrote; clients call them MODEL:NAME, after the file; "
        "repeatable",
    )
    add_loading_arguments(parser)
    parser.add_argument(
        "--model-timeout",
        type=number(least=-1),
        default=-1,
        help="unload a model after so many idle seconds (default: -1, never)",
    )
    above_0 = number(float, above=0)
    limits = parser.add_argument_group("limits")
    for flag, kind, default, help in (
        ("--max-body-mb", above_0, 20, "of a request, base64 included (default: 20)"),
        ("--max-image-pixels", positive, 40_000_000, "of a picture (default: 40 million)"),
        ("--max-video-pixels", positive, 20_000_000_000, "of a video (default: 20 thousand million)"),
        ("--max-pictures", not_negative, 128, "and frames of a request (default: 128)"),
        ("--num-frames", positive, None, "read of a video (default: as in the model's training, else 16)"),
        ("--max-text-characters", positive, 500_000, "of a request (default: 500,000)"),
        ("--max-new-tokens", positive, 1024, "of an answer (default: 1024)"),
        ("--body-timeout", above_0, 30, "seconds for a request to arrive (default: 30)"),
        ("--request-timeout", above_0, 300, "seconds, waiting included (default: 300)"),
        ("--slots", positive, 16, "requests prepared or answered at a time (default: 16)"),
        (
            "--batch-tokens",
            positive,
            16_384,
            "answers at a time by the length of the longest, prompt included, that memory is taken for; others wait "
            "(default: 16,384)",
        ),
        ("--prefill-tokens", positive, 512, "of new prompts read before others get their next token (default: 512)"),
        (
            "--prefix-cache-mb",
            number(float, least=0),
            256,
            "of what prompts begin with alike, kept for each model (default: 256; 0 keeps none)",
        ),
        ("--queue", not_negative, 64, "requests that may wait, then 429 (default: 64)"),
        ("--shutdown-timeout", not_negative, 30, "seconds to finish answers in (default: 30)"),
    ):
        limits.add_argument(flag, type=kind, default=default, help=help)
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin ask from a browser, e.g. http://localhost:3000, or *; repeatable",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this Host too, e.g. otter.example.org, or * for all; repeatable",
    )
    urls = parser.add_argument_group("addresses of pictures in requests")
    urls.add_argument("--no-fetch", action="store_true", help="read data: only, fetch no http(s) address")
    urls.add_argument("--max-fetches", type=not_negative, default=16, help="addresses of a request (default: 16)")
    urls.add_argument(
        "--fetch-timeout", type=above_0, default=20, help="seconds for all of them together (default: 20)"
    )
    urls.add_argument("--allow-private-addresses", action="store_true", help="fetch from this machine and network too")
    urls.add_argument("--allow-files", metavar="DIR", help="read file:// addresses below this folder")


def run(arguments: argparse.Namespace) -> None:
    """Load the first model and serve until the process is told to end."""
    for name in arguments.models:
        check_model_name(name, weights=True)
    skills = named_skills(arguments.models, arguments.skill)
    require_serving()
    import uvicorn
    from transformers.utils import logging

    from ..serving.app import create_app
    from ..serving.models import ServedModels

    settings = settings_from(arguments)
    if settings.api_key is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        logging.get_logger("otter_hf").warning(
            f"Anyone who reaches {arguments.host}:{arguments.port} may use this server; set {API_KEY_VARIABLE}."
        )
    check_port(arguments.host, arguments.port)
    models = ServedModels(
        arguments.models,
        skills=skills,
        model_timeout=arguments.model_timeout,
        **loading_options(arguments),
    )
    uvicorn.run(
        create_app(models, settings),
        host=arguments.host,
        port=arguments.port,
        timeout_graceful_shutdown=arguments.shutdown_timeout,
    )


def named_skills(models: list[str], given: list[str]) -> dict[str, tuple[str, Path]]:
    """
    What clients call each skill, its model and its file.

    Args:
        models: that are served.
        given: files, with `MODEL=` in front where several models are served.

    Raises:
        ValueError: for a skill of no model of these or of the name of another one, and where it is not said of which.
    """
    skills: dict[str, tuple[str, Path]] = {}
    for text in given:
        model, path = next(((m, text[len(m) + 1 :]) for m in models if text.startswith(f"{m}=")), (None, text))
        if model is None and len(models) > 1:
            raise ValueError(f"--skill {text}: say of which model it is, --skill MODEL={text}.")
        model = models[0] if model is None else model
        name = f"{model}:{Path(path).stem}"
        if name in skills:
            raise ValueError(f"--skill {text}: there is a {name} already; give one of the files another name.")
        skills[name] = (model, Path(path))
    return skills


def settings_from(arguments: argparse.Namespace):
    """The `ServerSettings` among the parsed arguments, with the API key of the environment."""
    from ..serving.fetch import FetchPolicy
    from ..serving.media import MediaLimits
    from ..serving.settings import ServerSettings

    body_bytes = int(arguments.max_body_mb * (1 << 20))
    if arguments.allow_files is not None and not Path(arguments.allow_files).is_dir():
        raise ValueError(f"--allow-files {arguments.allow_files}: there is no such folder.")
    return ServerSettings(
        api_key=os.environ.get(API_KEY_VARIABLE) or None,
        body_bytes=body_bytes,
        media=MediaLimits(
            image_pixels=arguments.max_image_pixels,
            video_pixels=arguments.max_video_pixels,
            pictures=arguments.max_pictures,
            text_characters=arguments.max_text_characters,
        ),
        fetch=FetchPolicy(
            http=not arguments.no_fetch,
            private_addresses=arguments.allow_private_addresses,
            file_root=None if arguments.allow_files is None else Path(arguments.allow_files),
            max_bytes=body_bytes,
            max_fetches=arguments.max_fetches,
            timeout=arguments.fetch_timeout,
        ),
        new_tokens=arguments.max_new_tokens,
        body_seconds=arguments.body_timeout,
        request_seconds=arguments.request_timeout,
        slots=arguments.slots,
        batch_tokens=arguments.batch_tokens,
        prefill_tokens=arguments.prefill_tokens,
        queue=arguments.queue,
        prefix_bytes=int(arguments.prefix_cache_mb * (1 << 20)),
        num_frames=arguments.num_frames,
        allow_origins=tuple(arguments.allow_origin),
        # the name it was told to listen at is its own
        allow_hosts=(arguments.host, *arguments.allow_host),
    )


def require_serving() -> None:
    """Raise ValueError where the packages of the server are missing."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError(missing("serving", "serve"))
