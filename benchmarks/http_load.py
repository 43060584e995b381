"""A client that sends requests at given times, whatever becomes of them, over connections that it keeps."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Outcome:
    """What came of the requests; seconds are from when a request was due."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """By status; 0 where there was no answer."""
    took: float = 0.0

    def count(self, status: int) -> int:
        """Requests with this status."""
        return len(self.seconds.get(status, ()))

    def quantile(self, share: float, status: int = 200) -> float | None:
        """Of the seconds of requests with this status."""
        found = self.seconds.get(status)
        return float(np.quantile(found, share)) if found else None


def due_times(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Moments of a Poisson process of `rate` a second."""
    chance = np.random.default_rng(seed)
    return np.cumsum(chance.exponential(1 / rate, int(rate * seconds)))


async def send_at(port: int, due: np.ndarray, body: Callable[[int], bytes]) -> Outcome:
    """Send a request at each moment, a free connection or a new one for each."""
    outcome, free, began = Outcome(), [], time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, moment in enumerate(due):
            await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
            group.create_task(_one(port, body(number), began + float(moment), free, outcome))
    outcome.took = time.perf_counter() - began
    return outcome


async def send_back_to_back(port: int, clients: int, seconds: float, body: Callable[[int], bytes]) -> Outcome:
    """Each of the clients sends its next request when it has the answer to the last."""
    outcome, began = Outcome(), time.perf_counter()
    numbers: Iterator[int] = iter(range(10**9))

    async def client() -> None:
        free: list[_Connection] = []
        while (now := time.perf_counter()) < began + seconds:
            await _one(port, body(next(numbers)), now, free, outcome)

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.took = time.perf_counter() - began
    return outcome


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _one(port: int, body: bytes, due: float, free: list[_Connection], outcome: Outcome) -> None:
    status = 0
    try:
        while free and free[-1][0].at_eof():  # closed meanwhile
            free.pop()
        reader, writer = free.pop() if free else await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
        await reader.readexactly(length)
        status = int(lines[0].split()[1])
        free.append((reader, writer))
    except (OSError, asyncio.IncompleteReadError):
        pass
    outcome.seconds.setdefault(status, []).append(time.perf_counter() - due)
