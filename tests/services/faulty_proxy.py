"""A proxy on loopback before an S3 server that damages, delays and refuses what it is told to, and counts what it saw."""

import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

Kind = Literal[
    "slow_down", "expired", "hidden", "ended", "kept", "kept_for_now", "refuse", "hang", "cut", "truncated", "shortened",
    "altered", "slow",
]  # fmt: skip

_ANSWERS: dict[str, tuple[int, str]] = {
    "slow_down": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "hidden": (404, "NoSuchKey"),
    "ended": (404, "NoSuchUpload"),
}
_PER_KEY = {"kept": "AccessDenied", "kept_for_now": "InternalError"}


@dataclass
class Fault:
    """What happens to requests that match.

    slow_down, expired, hidden, ended: the server is not asked, the answer is that error. kept, kept_for_now: nor is it asked, the
    answer to a bulk delete is a success with that error for one key. refuse: the connection is reset. hang: no
    answer. cut: the connection is reset in mid-body. truncated: it is closed in order in mid-body. shortened: half the body
    with a Content-Length to match. altered: one bit of the body is flipped. slow: `rate` bytes a second.
    """

    kind: Kind
    share: float = 1.0
    """Of the matching requests."""
    times: int = 10**9
    """At most so often."""
    each: int = 10**9
    """At most so often for one target."""
    method: str = ""
    """Left out: any."""
    path: str = ""
    """Some part of the request's target."""
    rate: int = 10**6


@dataclass
class Message:
    """A request or an answer: its head as it came, and its body."""

    head: bytes
    body: bytes

    @property
    def first_line(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)


@dataclass
class FaultyProxy:
    """Forwards bytes unchanged (a signature covers the Host header) but for the faults; used as a context manager."""

    upstream: str
    """Address of the server, http://127.0.0.1:port."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, target) of each, in order of arrival."""
    struck: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault was done."""

    def __enter__(self) -> "FaultyProxy":
        self._lock, self._over = threading.Lock(), threading.Event()
        self.plant()
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        server.daemon_threads, server.allow_reuse_address, server.request_queue_size = True, True, 128
        server.server_bind()
        server.server_activate()
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def plant(self, *faults: Fault, seed: int = 1) -> None:
        """These faults from now on; counting starts anew."""
        with self._lock:
            self._faults, self._chance = [replace(fault) for fault in faults], random.Random(seed)
            self._hits: Counter[tuple[str, str]] = Counter()
            self.requests.clear()
            self.struck.clear()

    def count(self, method: str, path: str = "") -> int:
        """Requests of a method whose target holds `path`, answered or not."""
        with self._lock:
            return sum(m == method and path in p for m, p in self.requests)

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError, EOFError):  # what either side breaks off is no failure of the proxy
                    proxy._serve(self.request)

        return Handler

    def _serve(self, client: socket.socket) -> None:
        stream = client.makefile("rb")
        host, port = urlsplit(self.upstream).hostname, urlsplit(self.upstream).port
        with socket.create_connection((host, port or 80)) as server:
            answers = server.makefile("rb")
            while request := _receive(stream, "", client):
                method, target = request.first_line[:2]
                fault = self._choose(method, target)
                kind = fault.kind if fault else ""
                if kind == "refuse":
                    return _reset(client)
                if kind == "hang":
                    self._over.wait()
                    return None
                if kind in _ANSWERS:
                    client.sendall(_error(*_ANSWERS[kind], method))
                    continue
                if kind in _PER_KEY:
                    error = f"<Error><Key>x</Key><Code>{_PER_KEY[kind]}</Code><Message>planted</Message></Error>"
                    client.sendall(_answer(200, f"<DeleteResult>{error}</DeleteResult>", method))
                    continue
                server.sendall(request.head + request.body)
                answer = _receive(answers, method, None)
                if answer is None:
                    return None
                head, body, half = answer.head, answer.body, len(answer.body) // 2
                if kind in ("cut", "truncated"):
                    client.sendall(head + body[:half])
                    return _reset(client) if kind == "cut" else None
                if kind == "shortened":
                    head, body = _without_checksum(head).replace(b": %d\r\n" % len(body), b": %d\r\n" % half), body[:half]
                elif kind == "altered" and body:
                    head, body = _without_checksum(head), body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
                self._send(client, head, body, fault.rate if fault and kind == "slow" else 0)
        return None

    def _choose(self, method: str, target: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, target))
            for fault in self._faults:
                known = (fault.kind, target)
                wanted = fault.method in ("", method) and fault.path in target and self._hits[known] < fault.each
                if wanted and fault.times and self._chance.random() < fault.share:
                    fault.times -= 1
                    self._hits[known] += 1
                    self.struck[fault.kind] += 1
                    return fault
        return None

    def _send(self, client: socket.socket, head: bytes, body: bytes, rate: int) -> None:
        if not rate:
            return client.sendall(head + body)
        client.sendall(head)
        step = max(1, rate // 20)
        for start in range(0, len(body), step):
            client.sendall(body[start : start + step])
            time.sleep(len(body[start : start + step]) / rate)
        return None


def _receive(stream: BinaryIO, method: str, client: socket.socket | None) -> Message | None:
    """The next message, None at the end of the stream; `method` is that of the request which it answers."""
    lines = []
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
    if not lines:
        return None
    head, fields = b"".join(lines) + b"\r\n", {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    if client and fields.get(b"expect") == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"".join(line for line in lines if not line.lower().startswith(b"expect:")) + b"\r\n"
    if method == "HEAD" or lines[0].split(b" ")[1] in (b"204", b"304"):
        return Message(head, b"")
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while True:
            size = stream.readline()
            chunk = stream.read(int(size.split(b";")[0], 16) + 2)
            body += size + chunk
            if len(chunk) == 2:
                return Message(head, body)
    length = int(fields.get(b"content-length", 0))
    body = stream.read(length)
    if len(body) < length:
        raise EOFError
    return Message(head, body)


def _error(status: int, code: str, method: str) -> bytes:
    return _answer(status, f"<Error><Code>{code}</Code><Message>planted</Message></Error>", method)


def _answer(status: int, xml: str, method: str) -> bytes:
    body = f"<?xml version='1.0'?>{xml}".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if method == "HEAD" else head + body


def _without_checksum(head: bytes) -> bytes:
    """The server's own checksum would betray the fault: without it, the hashes of the manifest must."""
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith((b"x-amz-checksum", b"etag")))


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
