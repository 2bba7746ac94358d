"""What is answered to which request."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from toolkit.errors import DataError, ToolkitError
from toolkit.normalise import normalise_row
from toolkit.predict.saved import SavedModel
from toolkit.serve.batching import Batcher, Busy
from toolkit.serve.page import page
from toolkit.text_files import checked

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_OWN_CONTENT = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"}
_EXAMPLES = {"texts": '{"inputs": ["…", "…"]}', "rows": '{"inputs": [{"column": "value"}]}'}


@dataclass(frozen=True)
class Service:
    """What there is to answer with.

    Attributes:
        saved: the model, as `find_model` found it.
        batcher: answers.
        limit: bytes of a request.
        public: whether other machines may ask; else names of this one alone are answered to, so that no page of
            another site can lead a browser here.
    """

    saved: SavedModel
    batcher: Batcher
    limit: int
    public: bool


def application(service: Service) -> Starlette:
    """The web application: `POST /predict`, `GET /health`, and a page to try it."""

    async def predict(request: Request) -> Response:
        _check_size(request, service.limit)
        if service.saved.kind.reads == "files":
            return JSONResponse({"answers": await _answer_files(request, service)})
        inputs = _inputs(await _json(request), service.saved)
        return JSONResponse({"answers": await _answers(inputs, service)})

    async def health(request: Request) -> Response:
        kind = service.saved.kind
        facts = {"model": str(service.saved.folder), "about": kind.about, "reads": kind.reads}
        return JSONResponse({"status": "ready", **facts, **service.batcher.counts})

    async def front(request: Request) -> Response:
        return HTMLResponse(
            page(service.saved), headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"}
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    routes = [Route("/predict", predict, methods=["POST"]), Route("/health", health), Route("/", front)]
    own = [] if service.public else [Middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK))]
    handlers: Any = {ToolkitError: _told, HTTPException: _refused, Busy: _busy, Exception: _defect}
    return Starlette(routes=routes, middleware=own, exception_handlers=handlers, lifespan=lifespan)


def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ToolkitError)
    return JSONResponse({"error": error.message, "remedy": error.remedy}, 400)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail, "remedy": ""}, error.status_code, headers=error.headers)


def _busy(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "too many requests wait", "remedy": "Try again."}, 503, headers={"Retry-After": "1"})


def _defect(request: Request, error: Exception) -> Response:
    """The server writes the traceback to its standard error."""
    return JSONResponse({"error": f"the server failed: {type(error).__name__}", "remedy": "See what it printed."}, 500)


def _check_size(request: Request, limit: int) -> None:
    """The server reads no more than a request says that it has."""
    size = request.headers.get("content-length", "")
    if not size.isdecimal():
        raise HTTPException(411, "the request does not say how long it is (Content-Length)")
    if int(size) > limit:
        raise HTTPException(413, f"the request has {int(size):,} bytes, and {limit:,} are taken (--max-bytes)")


async def _json(request: Request) -> Any:
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "the Content-Type must be application/json")
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from None


def _inputs(body: Any, saved: SavedModel) -> list[Any]:
    """What is to be answered, in the form of the run."""
    reads = saved.kind.reads
    inputs = body.get("inputs") if isinstance(body, dict) else None
    if not isinstance(inputs, list) or not inputs:
        raise DataError("the request has no list of inputs", f"Send {_EXAMPLES[reads]}.")
    wanted, name = (str, "text") if reads == "texts" else (dict, "object")
    for number, one in enumerate(inputs, start=1):
        if not isinstance(one, wanted):
            raise DataError(f"input {number} is no {name}", f"Send {_EXAMPLES[reads]}.")
    found = [checked(one, f"input {at}") if reads == "texts" else one for at, one in enumerate(inputs, start=1)]
    return [normalise_row(one, saved.normalise) for one in found] if saved.normalise else found


async def _answers(inputs: Sequence[Any], service: Service) -> list[dict[str, Any]]:
    found = await asyncio.wrap_future(service.batcher.submit(inputs))
    return [dict(answer.fields) for answer in found]


async def _answer_files(request: Request, service: Service) -> list[dict[str, Any]]:
    """Of what was sent along: a path in a request is never opened."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "this model reads files: send them as multipart/form-data, in fields called 'file'")
    async with request.form() as form:
        sent = [one for one in form.getlist("file") if isinstance(one, UploadFile)]
        if not sent:
            raise DataError("the request has no file", "Send them in fields called 'file': curl -F file=@NAME …")
        with tempfile.TemporaryDirectory() as folder, _without(Path(folder)):
            paths = [Path(folder, str(at), Path(one.filename or "file").name or "file") for at, one in enumerate(sent)]
            for path, one in zip(paths, sent, strict=True):
                path.parent.mkdir()
                path.write_bytes(await one.read())
            found = await _answers(paths, service)
    return [{**fields, "file": path.name} for fields, path in zip(found, paths, strict=True)]


@contextmanager
def _without(folder: Path) -> Iterator[None]:
    """Errors name what the user has sent, not where it lies."""
    try:
        yield
    except ToolkitError as error:
        words = error.message
        for inner in sorted(folder.iterdir()):
            words = words.replace(f"{inner}/", "")
        raise type(error)(words, error.remedy) from error
