"""Free ports on loopback."""

import socket


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held until the last one is known, so that they differ."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for server in held:
        server.close()
    return ports
