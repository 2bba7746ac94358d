"""The command `toolkit serve`: its options, what it refuses, and the server."""

from __future__ import annotations

import socket
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from toolkit.arguments import number, whole
from toolkit.errors import ConfigError
from toolkit.predict import find_model
from toolkit.predict.command import add_model_arguments, given_options, silence_libraries
from toolkit.predict.kinds import check_options, load_answerer
from toolkit.report import Console
from toolkit.requirements import check_versions, optional

_WAITING = 256
"""Requests that may wait for their answer; more are told to come again."""
_EXAMPLES = {
    "texts": """-H 'Content-Type: application/json' -d '{"inputs": ["TEXT"]}'""",
    "rows": """-H 'Content-Type: application/json' -d '{"inputs": [{"COLUMN": "VALUE"}]}'""",
    "files": "-F file=@FILE",
}


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of a model that a run has saved")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument(
        "--port", type=whole(last=65535), default=8000, help="to listen on (default: 8000; 0: any that is free)"
    )
    parser.add_argument(
        "--wait", type=number(0, 10_000), metavar="MS", default=5.0, help="that a request waits for others (default: 5)"
    )
    parser.add_argument(
        "--max-bytes", type=whole(1), metavar="N", default=32 * 2**20, help="of a request (default: 33554432)"
    )
    add_model_arguments(parser)


def run(arguments: Namespace) -> int:
    """`toolkit serve`: cheap checks first, then the model, and the port when it is ready.

    Raises:
        ToolkitError: a mistake of the user.
    """
    saved = find_model(Path(arguments.run))
    check_versions()
    options = given_options(arguments)
    check_options(saved.kind, options)
    uvicorn = optional("uvicorn", "toolkit serve", "serve")
    optional("python_multipart", "toolkit serve", "serve")
    optional("starlette", "toolkit serve", "serve")
    listening = _listen(arguments.host, arguments.port)
    silence_libraries()
    from toolkit.serve.app import Service, application
    from toolkit.serve.batching import Batcher

    answerer = load_answerer(saved.kind, saved, device=arguments.device, **options)
    batcher = Batcher(answerer, batch=arguments.batch, wait=arguments.wait / 1000, room=_WAITING)
    public = arguments.host not in ("127.0.0.1", "::1", "localhost")
    app = application(Service(saved, batcher, arguments.max_bytes, public))
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    notes = Console(out=sys.stderr)
    if public:
        notes.warn("everybody who reaches this address may ask, and nothing is encrypted: put a proxy in front of it")
    notes.note(f"serving {saved.kind.about}: {address}\n  curl {address}/predict {_EXAMPLES[saved.kind.reads]}")
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror}", "Name another port, or 0 for any that is free."
        ) from error
