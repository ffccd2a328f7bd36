"""`consistency-app`: the page on a port of this machine, without a word to any other."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig

from consistency.app.page import CSS, build
from consistency.app.studio import Studio

_LOOPBACK = ("127.0.0.1", "localhost")
_OVERHEAD = 1 << 20  # bytes of a request beside an upload: forms, drawings


def app(cfg: DictConfig) -> None:
    """Load the model, say the address, serve until Ctrl-C or SIGTERM."""
    _quiet()
    # Service managers end a process so; unhandled, it would leave the uploads behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from consistency.api import load

    studio = Studio(load(cfg.ckpt, weights=cfg.weights, device=cfg.device))
    with serving(studio, host=cfg.host, port=cfg.port, max_upload_mb=cfg.max_upload_mb) as blocks:
        print(f"consistency-app: {cfg.ckpt} at {blocks.local_url} on {studio.model.device}; Ctrl-C ends it", flush=True)
        blocks.server.thread.join()


@contextmanager
def serving(studio: Studio, *, host: str, port: int | None, max_upload_mb: int) -> Iterator[Any]:
    """The page, served from a thread while the context lasts; yields Gradio's Blocks, which know their `local_url`.

    Uploads and results lie in a folder of this server's own, which goes with it.

    Args:
        studio: What answers.
        host: 127.0.0.1 for this machine alone.
        port: None for the first free one from 7860.
        max_upload_mb: Of a file; larger requests are refused before they are read.

    Raises:
        OSError: in one line, if the port is taken or the host is none of this machine.
    """
    _quiet()
    _check_address(host, port)
    with TemporaryDirectory(prefix="consistency-app-", ignore_cleanup_errors=True) as folder, _gradio_folder(folder):
        blocks = build(studio)
        try:
            _launch(blocks, host, port, max_upload_mb << 20, 16 * studio.width * studio.height)
            yield blocks
        finally:
            blocks.close(verbose=False)


@contextmanager
def _gradio_folder(folder: str) -> Iterator[None]:
    """Gradio's files lie in `folder`; by default all users of a machine share one that nobody empties."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    os.environ[name] = folder
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _launch(blocks: Any, host: str, port: int | None, upload: int, board: int) -> None:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(BoundedRequests, limit=upload + board + _OVERHEAD)]
    if host in _LOOPBACK:  # a name of somebody else's that leads here is a page of theirs that reads this one
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK)))
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=upload,
        app_kwargs={"middleware": middleware},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        prevent_thread_lock=True,
        state_session_capacity=64,
        max_threads=8,
        footer_links=[],
        # Each of these is off by default or by an environment variable of Gradio's; here it is off.
        share=False, inline=False, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
        enable_monitoring=False, quiet=True,
    )  # fmt: skip


def _check_address(host: str, port: int | None) -> None:
    """Before Gradio tries: on a host of another machine it would wait for minutes."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"host={host}" if port is None else f"host={host} port={port}"
        raise OSError(
            f"cannot serve on {where}: {error.strerror}; change port (null: the first free one) or host"
        ) from error


class BoundedRequests:
    """Refuses requests whose body is longer than `limit` bytes, or of unsaid length, before reading them."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI. The server itself holds a body to the length that its header says."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"0")
            if b"transfer-encoding" in headers or not length.isdigit() or int(length) > self.limit:
                from starlette.responses import PlainTextResponse

                response = PlainTextResponse(f"larger than {self.limit:,} bytes, the limit of a request", 413)
                return await response(scope, receive, send)
        return await self.app(scope, receive, send)


def _quiet() -> None:
    """Before Gradio is imported: no telemetry, no check for versions, no line a request.

    Raises:
        ValueError: if Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("consistency-app needs Gradio: pip install 'consistency[app]'") from error
