"""The HTTP interface: paths, limits, the token, and what clients are told when something is wrong."""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmpo_dist import __version__
from dmpo_dist.config.serving import ServingConfig
from dmpo_dist.errors import UserError
from dmpo_dist.serving.backend import Backend, UnavailableError
from dmpo_dist.serving.metrics import Metrics
from dmpo_dist.serving.schema import (
    Body,
    ExplainAnswer,
    ExplainBody,
    RecommendAnswer,
    RecommendBody,
    RerankAnswer,
    RerankBody,
)

LOG = logging.getLogger(__name__)
PAGES = resources.files("dmpo_dist.serving") / "pages"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LOCAL_HOSTS = ["localhost", "127.0.0.1", "::1", "[::1]"]
CLIENT_GONE = 499  # nginx's number for it; nobody reads the answer
HEALTH_SECONDS = 10


class LimitedBody:
    """ASGI middleware: a body of more than ``most`` bytes is refused before it is in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            answer = _error(413, f"the body has {int(declared)} bytes, more than {self._most} (serving.most_body_kib)")
            return await answer(scope, receive, send)
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._most:
                raise StarletteHTTPException(413, f"the body has more than {self._most} bytes (serving.most_body_kib)")
            return message

        return await self._app(scope, counted, send)


class Desk:
    """Hands requests to the backend: limits, deadline, clients that hang up, and metrics."""

    def __init__(self, backend: Backend, config: ServingConfig) -> None:
        self._backend, self._config = backend, config
        self.metrics = Metrics(backend.states)
        self._under_way = 0

    async def ask(self, endpoint: str, argument: Any, request: Request) -> Response:
        """The answer of the backend as a response, whatever becomes of it."""
        start = time.perf_counter()
        response = await self._ask(endpoint, argument, request)
        self.metrics.requests.labels(endpoint, str(response.status_code)).inc()
        self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)
        return response

    async def _ask(self, endpoint: str, argument: Any, request: Request) -> Response:
        if self._under_way >= self._config.most_waiting:
            return _later(f"{self._under_way} requests are under way, as many as serving.most_waiting allows", 1)
        self._under_way += 1
        self.metrics.under_way.set(self._under_way)
        work = asyncio.ensure_future(self._backend.call(endpoint, argument))
        gone = asyncio.ensure_future(_hang_up(request))
        try:
            await asyncio.wait({work, gone}, timeout=self._config.timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return JSONResponse(work.result())
            if gone.done():
                return Response(status_code=CLIENT_GONE)
            return _later(f"no answer in serving.timeout_seconds={self._config.timeout_seconds:g}", 5)
        except UserError as error:
            return _error(422, str(error))
        except UnavailableError as error:
            return _later(str(error), error.seconds)
        except Exception:
            number = uuid4().hex
            LOG.exception("request %s to %s failed", number, endpoint)
            return _error(500, f"the server failed to answer; its log says why, under {number}")
        finally:
            for task in (work, gone):
                task.cancel()
            self._under_way -= 1
            self.metrics.under_way.set(self._under_way)

    async def health(self, known: bool) -> Response:
        """The state of a copy of the model, or that there is none; details only for clients who are ``known``."""
        try:
            state = await asyncio.wait_for(self._backend.call("state", None), HEALTH_SECONDS)
        except (UnavailableError, TimeoutError) as error:
            return _later(str(error) or "no copy of the model answers", 5)
        return JSONResponse({"status": "ok"} | ({"version": __version__, **state} if known else {}))


def make_app(backend: Backend, config: ServingConfig, token: str | None) -> FastAPI:
    """The interface to ``backend``.

    Args:
        config: limits.
        token: what clients must send as ``Authorization: Bearer TOKEN``; None for none, on a loopback address alone.
    """
    app = FastAPIOffline(
        "/docs", None, title="dmpo serve", version=__version__,
        description="Ranks titles for a user by a language model that dmpo_dist has trained.",
    )  # fmt: skip
    app.add_middleware(LimitedBody, most=config.most_body_kib * 1024)
    if token is None:  # or a page on the internet whose name points to this machine could ask in a visitor's name
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS, www_redirect=False)
    desk = Desk(backend, config)
    _add_errors(app)
    _add_answers(app, desk, config, token)
    _add_pages(app)
    return app


def _add_answers(app: FastAPI, desk: Desk, config: ServingConfig, token: str | None) -> None:
    allowed = [Depends(_guard(token))]
    failures: dict[int | str, dict[str, Any]] = {
        401: {"description": "The token is missing or wrong."},
        413: {"description": "The body is too large."},
        503: {"description": "Try again after the seconds in Retry-After."},
    }

    @app.post("/rerank", include_in_schema=False, dependencies=allowed)
    @app.post("/v2/rerank", include_in_schema=False, dependencies=allowed)
    @app.post("/v1/rerank", response_model=RerankAnswer, dependencies=allowed, responses=failures)
    async def rerank(body: RerankBody, request: Request) -> Response:
        """Rank documents for a user; the shape is that of Cohere, Jina and vLLM."""
        _check(body.titles, body.documents, config)
        return await desk.ask("rerank", _content(body), request)

    @app.post("/v1/recommend", response_model=RecommendAnswer, dependencies=allowed, responses=failures)
    async def recommend(body: RecommendBody, request: Request) -> Response:
        """The best titles of the whole catalogue for a user."""
        _check(body.history, [], config)
        return await desk.ask("recommend", _content(body), request)

    @app.post("/v1/explain", response_model=ExplainAnswer, dependencies=allowed, responses=failures)
    async def explain(body: ExplainBody, request: Request) -> Response:
        """What each history title contributes to each of some documents."""
        _check(body.history, body.documents, config)
        return await desk.ask("explain", _content(body), request)

    @app.get("/v1/titles", dependencies=allowed)
    async def titles(request: Request, like: Annotated[str, Query(max_length=200)] = "") -> Response:
        """Titles of the catalogue with a text in them."""
        return await desk.ask("titles", like, request)

    if config.is_local if config.show_users is None else config.show_users:

        @app.get("/v1/users", dependencies=allowed)
        async def users(request: Request, like: Annotated[str, Query(max_length=200)] = "") -> Response:
            """Users of the prepared data whose names begin with a text, and their histories."""
            return await desk.ask("users", like, request)

    @app.get("/health")
    async def health(known: Annotated[bool, Depends(_knows(token))]) -> Response:
        """Whether a copy of the model answers; with the token, what it is, and whether its catalogue is the latest."""
        return await desk.health(known)

    @app.get("/metrics", dependencies=allowed)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(str(PAGES / "page.html"), headers=HEADERS)

    @app.get("/pages/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in ("page.js", "page.css"):
            raise HTTPException(404, f"no page {name}")
        return FileResponse(str(PAGES / name), headers=HEADERS)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return _error(422, "; ".join(map(_problem, error.errors()[:5])))

    @app.exception_handler(StarletteHTTPException)
    async def refused(_request: Request, error: StarletteHTTPException) -> Response:
        return _error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(UserError)
    async def mistaken(_request: Request, error: UserError) -> Response:
        return _error(422, str(error))


def _knows(token: str | None) -> Callable[..., bool]:
    """A dependency that says whether a client has the token, or needs none."""
    bearer = HTTPBearer(auto_error=False, description="The token of DMPO_SERVE_TOKEN or serving.token_file.")

    def nobody_is_asked() -> bool:
        return True

    def knows(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> bool:
        return sent is not None and hmac.compare_digest(sent.credentials.encode(), str(token).encode())

    return nobody_is_asked if token is None else knows


def _guard(token: str | None) -> Callable[..., None]:
    """A dependency that lets in who has the token."""

    def guard(known: Annotated[bool, Depends(_knows(token))]) -> None:
        if not known:
            raise HTTPException(
                401, "send the server's token as Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    return guard


def _check(history: list[str], documents: list[str], config: ServingConfig) -> None:
    """Raise UserError for a request beyond the limits of ``config``."""
    for name, titles, most, key in (
        ("history", history, config.most_history, "most_history"),
        ("documents", documents, config.most_documents, "most_documents"),
    ):
        if len(titles) > most:
            raise UserError(f"{name}: {len(titles)} are given, more than {most} (serving.{key}); send fewer")
        longest = max(map(len, titles), default=0)
        if longest > config.most_characters:
            raise UserError(
                f"{name}: a title has {longest} characters, more than {config.most_characters} "
                "(serving.most_characters); shorten it"
            )


def _content(body: Body) -> dict[str, Any]:
    return body.model_dump(mode="json")


async def _hang_up(request: Request) -> None:
    """Return when the client has gone; its body was read before."""
    with suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _problem(error: Any) -> str:
    """One mistake in a body, without the value, which may be long."""
    # After body or query keys and indices; where a key may hold one of several types, the name of a type, too.
    where = ".".join(str(part) for part in error["loc"][1:] if re.fullmatch(r"\w+", str(part)))
    if error["type"] == "model_attributes_type" or (not where and error["type"] == "missing"):
        return "the body must be a JSON object, sent with the header Content-Type: application/json"
    if error["type"] == "json_invalid":
        return f"the body is not JSON ({error['ctx']['error']} at character {error['loc'][-1]})"
    text = error["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _later(reason: str, seconds: int) -> Response:
    return _error(503, f"{reason}; try again in {seconds} s", {"Retry-After": str(seconds)})


def _error(status: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": {"code": status, "message": message}}, status, headers)
