"""An address to listen on."""

import socket

from ctrsink.errors import InputError

KEPT_S = 75
"""How long a connection may be idle: longer than load balancers keep one, which else send a request into a closing connection."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is a free one.

    Raises:
        InputError: there is no such address, or somebody else listens there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror or error}; give --host and --port") from None
    return listening
