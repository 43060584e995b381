"""The client of the load benchmark counts every request once, by what came of it."""

import asyncio

import numpy as np
import pytest

from benchmarks.http_load import due_times, send_at, send_back_to_back


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """200, 503, and a connection that is closed, by the body; a kept connection takes more."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.partition("Content-Length: ")[2].split()[0])
            body = await reader.readexactly(length)
            if body == b"gone":
                break
            await asyncio.sleep(0.02)
            writer.write(b"HTTP/1.1 %s OK\r\nContent-Length: 2\r\n\r\n{}" % body)
    except asyncio.IncompleteReadError:
        pass
    writer.close()


def test_every_request_is_counted_by_its_status_and_timed_from_when_it_was_due() -> None:
    async def act() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        bodies = [b"200", b"503", b"200", b"gone"]
        outcome = await send_at(port, np.linspace(0, 0.2, 40), lambda number: bodies[number % 4])
        assert {status: outcome.count(status) for status in (200, 503, 0)} == {200: 20, 503: 10, 0: 10}
        fastest = outcome.quantile(0.0)
        assert fastest is not None
        assert 0.02 <= fastest < outcome.took
        assert outcome.quantile(0.5, 404) is None
        closed = await send_back_to_back(port, 2, 0.2, lambda number: b"200")
        assert closed.seconds.keys() == {200}
        server.close()
        nobody = await send_at(port, np.zeros(2), lambda number: b"200")
        assert nobody.count(0) == 2

    asyncio.run(act())


def test_due_times_are_those_of_the_rate() -> None:
    due = due_times(50, 100)
    assert len(due) == 5000
    assert due[-1] == pytest.approx(100, rel=0.1)
    assert np.all(np.diff(due) > 0)
