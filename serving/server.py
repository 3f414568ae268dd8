"""The server process: a socket, uvicorn, and an orderly end."""

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ..common.errors import InputError
from ..common.logging import get_logger
from .app import make_app
from .options import ServingOptions
from .service import Service

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel

logger = get_logger(__name__)

BACKLOG = 512


class DrainingServer(uvicorn.Server):
    """Server that, after SIGTERM or SIGINT, answers the requests that it has, refuses others, and ends with status 0.

    uvicorn itself closes its socket at once, and ends by the signal. A second signal ends the process at once.

    Args:
        config: configuration of uvicorn.
        service: the service behind it.
    """

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once at the second signal."""
        if self.is_ending:
            os._exit(128 + sig)
        self.is_ending = True
        if self.loop is None:
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(lambda: self.service.tasks.append(asyncio.ensure_future(self.end())))

    async def end(self) -> None:
        """Drain the service, then let uvicorn end."""
        logger.info("Stopping: requests that have arrived are answered.")
        await self.service.drain()
        self.should_exit = True


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Args:
        host: name or address of the interface.
        port: port, or 0 for a free one.

    Raises:
        InputError: if the port is taken, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise InputError(
            f"The server cannot listen on {host!r}, port {port}: {error.strerror or error}. Choose others with --host "
            "and --port."
        ) from error
    return listener


def run_server(load: Callable[[], "QFormerCaptioningModel"], options: ServingOptions, host: str, port: int) -> None:
    """Serve a captioner until a signal.

    Args:
        load: function that loads the captioner.
        options: options of the server.
        host: name or address of the interface.
        port: port, or 0 for a free one.

    Raises:
        InputError: if the port is taken, or the captioner cannot be loaded.
    """
    listener = open_socket(host, port)
    server: DrainingServer

    def stop() -> None:
        server.should_exit = True

    service = Service(load, options, stop)
    config = uvicorn.Config(
        make_app(service),
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = DrainingServer(config, service)
    shown = f"[{host}]" if ":" in host else host
    logger.info("Serving %r at http://%s:%d/v1", options.name, shown, listener.getsockname()[1])
    server.run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
