"""``dataflex report --serve``: the latest page of a run, for browsers on this machine alone."""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from dataflex.errors import ConfigError
from dataflex.printable import on_one_line

PORT = 8765


class Served:
    """What is served: the page, which may be set anew at any time."""

    page = b"<!DOCTYPE html><title>DataFlex</title><p>The page is being made; load it again.</p>"

    def __init__(self, address: str) -> None:
        self.address = address


@contextmanager
def serving(host: str, port: int) -> Iterator[Served]:
    """Serve a page from a thread while inside.

    Only this machine is answered, and only what names it: a page of another origin, whose name was made to lead here,
    cannot read it.

    Raises:
        ConfigError: ``host`` is not a loopback address, or the port is taken, reserved or no port.
    """
    given, host = on_one_line(host)[:80], "127.0.0.1" if host == "localhost" else host
    if not _is_loopback(host):
        raise ConfigError(f"--host: {given!r} is not of this machine alone; expected 127.0.0.1, ::1 or localhost")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected 0 (any that is free) to 65535, found {port}")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path.partition("?")[0] in ("/", "/report.html")
            try:
                name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            except ValueError:  # it is no name
                name = ""
            code = 404 if not known else 200 if name == "localhost" or _is_loopback(name) else 403
            content = served.page if code == 200 else b"the page of a run is at /, for this machine alone\n"
            self.send_response(code)
            self.send_header("Content-Type", "text/html; charset=utf-8" if code == 200 else "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Keep the terminal for the run."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing of a browser that went away."""
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    try:
        server = Server((host, port), Answer)
    except OSError as error:
        told = f"{port} on {host} cannot be used ({error.strerror or error})"
        raise ConfigError(f"--port: {told}; name another, or 0 for any that is free") from error
    served = Served(f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
