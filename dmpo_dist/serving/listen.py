"""A socket and a server on it, until a signal ends them."""

import os
import signal
import socket
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from dmpo_dist.config.serving import TOKEN_VARIABLE, ServingConfig
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import read_text

SHORTEST_TOKEN = 16
GOODBYE_SECONDS = 30
"""For answers under way when the server is asked to end."""


def read_token(config: ServingConfig) -> str | None:
    """The token that clients must send; None for none.

    Raises:
        UserError: a file that cannot be read, a short token, or none where others can connect.
    """
    if config.token_file is not None:
        token, source = read_text(config.token_file, "correct serving.token_file").strip(), str(config.token_file)
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token and config.is_local:
            return None
        if not token:
            raise UserError(
                f"serving.host={config.host} lets other machines connect, so clients need a token: set the variable "
                f"{TOKEN_VARIABLE} or serving.token_file to one made by `openssl rand -hex 32`"
            )
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(map(str.isspace, token)):
        raise UserError(
            f"{source}: the token must have at least {SHORTEST_TOKEN} ASCII characters and no space; make one with "
            "`openssl rand -hex 32`"
        )
    return token


def open_socket(config: ServingConfig) -> socket.socket:
    """A socket that listens at ``serving.host`` and ``serving.port``.

    Raises:
        UserError: the address is not this machine's, or the port is taken or not allowed.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((config.host, config.port))
        listening.listen(1024)
    except OSError as error:
        raise UserError(
            f"serving.host={config.host} serving.port={config.port}: cannot listen there ({error.strerror}); choose "
            "another port, or 0 for a free one"
        ) from None
    return listening


def address_of(listening: socket.socket) -> str:
    """http://host:port."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, listening: socket.socket) -> None:
    """Answer at ``listening`` until Ctrl-C or SIGTERM, and what is under way then; returns like any function."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
        make_server(app).run(sockets=[listening])


def make_server(app: FastAPI) -> uvicorn.Server:
    """A server that answers what is under way before it ends."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GOODBYE_SECONDS, server_header=False,
        lifespan="off",
    )  # fmt: skip
    return uvicorn.Server(config)
