"""The application: routes, and what stands before them."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from llava_cot.core import Feature
from llava_cot.generator import SwiresGenerator
from llava_cot.scoring import Scorer
from llava_cot.serve.auth import Guard
from llava_cot.serve.body import read_body
from llava_cot.serve.chat import Chat, stops_of
from llava_cot.serve.continuation import Continuations
from llava_cot.serve.decisions import Decisions
from llava_cot.serve.errors import RequestError
from llava_cot.serve.fetch import Fetcher
from llava_cot.serve.gate import Gate
from llava_cot.serve.held import Held
from llava_cot.serve.images import ImageReader
from llava_cot.serve.intake import Intake, asked_in_chat, within
from llava_cot.serve.limits import Limits
from llava_cot.serve.metrics import Metrics
from llava_cot.serve.page.routes import page_router
from llava_cot.serve.presets import Presets
from llava_cot.serve.responses import Responses, asked_in_responses
from llava_cot.serve.running import ClientGone, unless_gone
from llava_cot.serve.schema import ChatRequest, DecisionsRequest, ResponsesRequest
from llava_cot.trace.writer import to_json

PING = 10  # seconds between comments that keep an idle stream open
SEND_TIMEOUT = 30  # seconds that a client may take to read one event


def create_app(
    generator: SwiresGenerator,
    *,
    name: str,
    search: str = "swires",
    scorer: str | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    limits: Limits = Limits(),  # noqa: B008, it is frozen
    api_keys: tuple[str, ...] = (),
    host: str = "127.0.0.1",
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """Return the ASGI application that serves ``generator``.

    Args:
        name: the id of the model that answers by ``search``; ``name:greedy`` and so on answer by theirs.
        scorer: the scorer of searches that do not name one; by default that of the search.
        scorers: scorers that requests may name, beside those of ``llava_cot.scoring.SCORERS``.
        api_keys: one of them must come with each request but those for health; without any, none is asked for.
        host: where it listens. On a loopback address without keys, requests for other hosts are refused.
        fetcher: fetches images by URL; by default only data URIs are taken.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    presets = Presets(name, search)
    intake = Intake(generator, presets, limits, ImageReader(limits, fetcher), scorers or {}, scorer)
    gate, held = Gate(limits.max_queue), Held(limits)
    metrics = Metrics(generator.engine, gate, held)
    gate.on_refused = metrics.refused

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        intake.close()
        generator.aio.engine.close()

    app = FastAPI(title="llava-cot", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.gate = gate
    app.add_middleware(gate.wrap)  # type: ignore[arg-type]
    app.add_middleware(Guard, keys=api_keys, host=host, limits=limits, held=held, gate=gate)  # type: ignore[arg-type]
    _add_errors(app, metrics)
    _add_status(app, generator, presets, gate, metrics, limits)
    _add_api(app, intake, metrics)
    app.include_router(page_router())
    return app


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        metrics.refused(error.status)
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        words = {404: "there is no such route", 405: "the route does not take this method"}
        message = words.get(error.status_code, "the request is wrong")
        known = RequestError(error.status_code, message, headers=error.headers)
        return known.response()

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return RequestError(500, "the server failed; its log says why").response()


def _add_status(
    app: FastAPI, generator: SwiresGenerator, presets: Presets, gate: Gate, metrics: Metrics, limits: Limits
) -> None:
    started = int(time.time())

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "draining"}, 503) if gate.is_draining else JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def shown() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def described(id: str, search: str) -> dict[str, Any]:
        own = {
            "model": presets.name,
            "search": search,
            "grammar": generator.grammar.to_dict(),
            "features": sorted(generator.engine.features - {Feature.EXTEND}),
            "eos_token_ids": sorted(generator.engine.eos_token_ids),
            "max_new_tokens": limits.max_new_tokens,
        }
        return {"id": id, "object": "model", "created": started, "owned_by": "llava-cot", "llava_cot": own}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(*item) for item in presets.searches.items()]}

    @app.get("/v1/models/{id:path}")
    async def model(id: str) -> dict[str, Any]:
        return described(id, presets.search_of(id))


def _add_api(app: FastAPI, intake: Intake, metrics: Metrics) -> None:
    chat, continuations = Chat(intake, metrics), Continuations(intake, metrics)
    responses, decisions = Responses(intake, metrics), Decisions(intake, metrics)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        asked = await read_body(request, ChatRequest, intake.limits)
        in_chat = asked_in_chat(asked)
        if asked.llava_cot.output == "raw":
            work = await continuations.work(asked, in_chat, request.state.holding)
            return _json(await unless_gone(request, continuations.reply(asked, work)))
        refuse_raw(asked)
        within("stop must have", len(stops_of(asked)), 0, intake.limits.max_stop, "entries")
        work = await intake.work(in_chat, request.state.holding)
        if asked.stream:
            return _events(chat.stream(asked, work))
        return _json(await unless_gone(request, chat.reply(asked, work)))

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        asked = await read_body(request, ResponsesRequest, intake.limits)
        work = await intake.work(asked_in_responses(asked), request.state.holding)
        if asked.stream:
            return _events(responses.stream(asked, work))
        return _json(await unless_gone(request, responses.reply(asked, work)))

    @app.post("/v1/decisions")
    async def decide(request: Request) -> Response:
        asked = await read_body(request, DecisionsRequest, intake.limits)
        work = await decisions.work(asked, request.state.holding)
        return _json(await unless_gone(request, decisions.reply(asked, work)))


def refuse_raw(request: ChatRequest) -> None:
    """Raise ``RequestError`` for fields that only raw continuations have."""
    extension = request.llava_cot
    given: dict[str, bool] = {
        "continue_final_message": request.continue_final_message,
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "llava_cot.prefix_token_ids": extension.prefix_token_ids is not None,
        "llava_cot.seeds": extension.seeds is not None,
    }
    for name, is_given in given.items():
        if is_given:
            raise RequestError(400, f"{name} must not be given without llava_cot.output='raw'", name)


def _json(data: Any) -> Response:
    return Response(to_json(data), media_type="application/json")


def _events(data: AsyncGenerator[Any, None]) -> Response:
    return Stream(data, ping=PING, send_timeout=SEND_TIMEOUT, sep="\n")


class Stream(EventSourceResponse):
    """A stream of events. A client that does not read it is dropped, which is no error of the server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)
