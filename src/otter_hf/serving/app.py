"""The HTTP server: OpenAI's chat completions for the models of this package."""

import asyncio
import hmac
import json
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from .chat_completions import ChatCompletions, ClientGone, error_body
from .metrics import Metrics
from .models import ServedModels
from .settings import ServerSettings


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

    async def authorize(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if settings.api_key is not None and not hmac.compare_digest(given.encode(), settings.api_key.encode()):
            raise HTTPException(401, "Send the API key of this server as the header Authorization: Bearer KEY.")

    async def read_body(request: Request) -> dict:
        return await read_json(request, settings.body_bytes)

    app = FastAPI(title="otter-hf", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # answers a browser's preflight in any case, and lets no origin in by default
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    locked = [Depends(authorize)]

    @app.post("/v1/chat/completions", dependencies=locked)
    async def chat_completions(request: Request) -> Response:
        status = 499  # the client left
        try:
            response = await chat.respond(request, read_body)
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
        for model in models.get_gen_models():
            if model["id"] == name:
                return model
        raise HTTPException(404, f"This server has no model {name!r}; it has {', '.join(models.names)}.")

    @app.get("/metrics", dependencies=locked)
    async def get_metrics() -> PlainTextResponse:
        running, admitted = chat.gate.running, chat.gate.admitted
        return PlainTextResponse(metrics.render(otter_running=running, otter_waiting=admitted - running))

    @app.options("/{path:path}")
    async def options(path: str) -> Response:
        return Response(status_code=204, headers={"Allow": "GET, POST, OPTIONS"})

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(StarletteHTTPException)
    async def say_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse(error_body(error), error.status_code, headers=error.headers)

    app.state.chat = chat
    return app


async def read_json(request: Request, limit: int) -> dict:
    """The JSON object in the body of a request; HTTPException 413 for more than `limit` bytes, 400 for no object."""
    chunks, size = [], 0
    announced = request.headers.get("Content-Length", "")
    too_large = HTTPException(413, f"The request is larger than {limit} bytes; send smaller pictures or videos.")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    try:
        # megabytes of base64 take a moment, in which others are answered
        body = await asyncio.to_thread(json.loads, b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The body of the request is not JSON.") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "The body of the request is not a JSON object.")
    return body
