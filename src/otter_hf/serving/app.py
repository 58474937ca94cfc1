"""The HTTP server: OpenAI's chat completions for the models of this package."""

import hmac
import ipaddress
import re
from collections.abc import Sequence
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from .chat_completions import ChatCompletions, ClientGone
from .errors import error_body
from .metrics import Metrics
from .models import ServedModels
from .settings import ServerSettings


# reserved by RFC 6761, 6762 and 8375; ICANN keeps the last out of the DNS for networks of one's own
NOT_OF_THE_WEB = (".localhost", ".local", ".home.arpa", ".internal")


_ROUTES = "POST /v1/chat/completions, GET /v1/models, GET /health and GET /metrics"


def create_app(models: ServedModels, settings: ServerSettings) -> FastAPI:
    """
    The routes `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`.

    Those of `transformers serve` which load other models or read pictures without limits are left out.

    Args:
        models: what it answers with.
        settings: what it allows.
    """
    metrics = Metrics()
    chat = ChatCompletions(models, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        models.shutdown()

    app = FastAPI(title="otter-hf", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # answers a browser's preflight in any case, and lets no origin in by default
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )

    # functions, and not partials of some: FastAPI before 0.124 does not await those, and would let everyone in
    async def of_known_host(request: Request) -> None:
        check_host(settings, request)

    async def with_key(request: Request) -> None:
        authorize(settings, request)

    known_host = Depends(of_known_host)
    locked = [known_host, Depends(with_key)]

    @app.post("/v1/chat/completions", dependencies=locked)
    async def chat_completions(request: Request) -> Response:
        status = 499  # the client left
        try:
            response = await chat.respond(request)
            status = response.status_code
        except ClientGone:
            response = Response(status_code=status)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.add("otter_requests_total", status=status)
        return response

    @app.get("/v1/models", dependencies=locked)
    async def list_models() -> dict:
        return {"object": "list", "data": models.get_gen_models()}

    @app.get("/v1/models/{name:path}", dependencies=locked)
    async def get_model(name: str) -> dict:
        return find_model(models, name)

    @app.get("/metrics", dependencies=locked)
    async def get_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(**chat.gauges()))

    @app.options("/{path:path}")
    async def options(path: str) -> Response:
        return Response(status_code=204, headers={"Allow": "GET, POST, OPTIONS"})

    @app.get("/health", dependencies=[known_host])
    async def health() -> dict:
        chat.check_device()
        return {"status": "ok"}

    @app.exception_handler(StarletteHTTPException)
    async def say_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        if error.status_code in (404, 405) and not isinstance(error, HTTPException):  # of the router
            error.detail = f"This server has no {request.method} {request.url.path:.80}; it has {_ROUTES}."
        return JSONResponse(error_body(error), error.status_code, headers=error.headers)

    app.state.chat = chat
    return app


def check_host(settings: ServerSettings, request: Request) -> None:
    """Raise HTTPException 400 for a `Host` that the server does not answer to."""
    host = request.headers.get("Host", "")
    if not is_allowed_host(host, settings.allow_hosts):
        raise HTTPException(
            400, f"This server does not answer to the Host {host!r:.80}; allow it with --allow-host NAME."
        )


def authorize(settings: ServerSettings, request: Request) -> None:
    """Raise HTTPException 401 for a request without the API key."""
    given = re.sub("^bearer +", "", request.headers.get("Authorization", ""), flags=re.IGNORECASE)
    if settings.api_key is not None and not hmac.compare_digest(given.encode(), settings.api_key.encode()):
        raise HTTPException(401, "Send the API key of this server as the header Authorization: Bearer KEY.")


def find_model(models: ServedModels, name: str) -> dict:
    """A model as the OpenAI API lists it; HTTPException 404 for another."""
    for model in models.get_gen_models():
        if model["id"] == name:
            return model
    raise HTTPException(404, models.refusal_of(name))


def is_allowed_host(host: str, allowed: Sequence[str]) -> bool:
    """
    Whether a request with this `Host` is answered. A page of the web can have its own name lead to this machine (DNS
    rebinding) and ask with it. Numbers, names without a dot (`localhost`, `gpu-box`) and those of private networks
    (`host.docker.internal`, `otter.default.svc.cluster.local`) are no names of the web; others must be allowed.

    Args:
        host: the header, with or without a port.
        allowed: further names, or `*` for all.
    """
    if "*" in allowed:
        return True
    name = re.sub(r":\d*$", "", host).lower().rstrip(".")
    if name in {one.lower() for one in allowed}:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        return True
    except ValueError:
        pattern = r"[a-z0-9_.-]+" if name.endswith(NOT_OF_THE_WEB) else r"[a-z0-9_-]+"
        return re.fullmatch(pattern, name) is not None
