"""Whether anybody answers at an address: asked first, because Ray would wait there for minutes, or for ever."""

import os
import socket
from urllib.parse import urlsplit

from ctrsink.errors import InputError

PATIENCE_S = 3.0
# HTTP/2 (RFC 9113, section 3.4): what a client says first, and the kind of frame that a server answers with, as gRPC does.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


def cluster_address(given: str | None, named: str = "runtime.address") -> str | None:
    """Where the cluster is that a run joins: `given` (to messages `named`), else RAY_ADDRESS, else None: one is started here.

    Raises:
        InputError: as `require_cluster`.
    """
    address = given or os.environ.get("RAY_ADDRESS") or None
    if address:
        require_cluster(address, named if given else "RAY_ADDRESS")
    return address


def require_cluster(address: str, named: str) -> None:
    """Check that a Ray cluster answers at `address`, where that names a host.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or one of the words that Ray knows.
        named: where the address was given, for messages.

    Raises:
        InputError: it is no such address, or nobody who may be Ray answers there.
    """
    if address in ("auto", "local"):
        return
    host, port = _host_and_port(address.removeprefix("ray://"))
    if host is None or port is None:
        raise InputError(f"{named} {address!r} is no address of a Ray cluster: give HOST:6379, or ray://HOST:10001")
    try:
        require_answer(host, port, speaks_grpc=os.environ.get("RAY_USE_TLS", "0") != "1")
    except OSError as error:
        raise InputError(f"{named} {address}: {told(error)}: start the cluster there, or correct the address") from None


def require_answer(host: str, port: int, speaks_grpc: bool = False) -> None:
    """Connect and hang up again.

    Raises:
        OSError: nobody answers within PATIENCE_S, or somebody who does not speak gRPC.
    """
    with socket.create_connection((host, port), PATIENCE_S) as connection:
        if not speaks_grpc:
            return
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < 9 and (more := connection.recv(9 - len(answer))):
            answer += more
        if len(answer) < 9 or answer[3] != _SETTINGS:
            raise ConnectionError("what answers there is no Ray cluster")


def told(error: OSError) -> str:
    """The failure of `require_answer` in a few words."""
    return "nobody answers there" if isinstance(error, TimeoutError) else error.strerror or str(error) or type(error).__name__


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(f"//{address}")
        whole = parts.netloc == address and "@" not in address
        return (parts.hostname, parts.port) if whole else (None, None)
    except ValueError:
        return None, None
