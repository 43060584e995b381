"""What waits for the model: batches within a budget of tokens, bounded, with deadlines, and nothing is done for nobody."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from ctrsink.config.serve import QueueSpec
from ctrsink.errors import InputError
from ctrsink.serve.batcher import Batcher
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.refused import Refused


@dataclass(eq=False)
class Piece:
    tokens: int
    fails: bool = False


@dataclass(eq=False)
class Slow:
    """A model that runs when it is let."""

    version: str = "m@1"
    batches: list[list[int]] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    def run(self, batch: list[Piece]) -> list[Any]:
        self.go.wait(10)
        self.batches.append([piece.tokens for piece in batch])
        if any(piece.fails for piece in batch):
            raise RuntimeError("no memory")
        return [InputError("not finite") if piece.tokens == 13 else [piece.tokens / 100] for piece in batch]


def played(act: Callable[[Batcher, Slow], Awaitable[None]], **spec: Any) -> None:
    """Run `act` with a batcher that works."""

    async def whole() -> None:
        batcher = Batcher(QueueSpec(**{"requests": 10, "tokens": 1000, "batch_tokens": 100, **spec}), Metrics())
        working = asyncio.create_task(batcher.work())
        model = Slow()
        try:
            await act(batcher, model)
        finally:
            model.go.set()
            working.cancel()
            batcher.close()

    asyncio.run(whole())


def later(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def asked(batcher: Batcher, model: Slow, *pieces: Piece, seconds: float = 10) -> list[asyncio.Task[list[float]]]:
    """Each waits; the model is busy with the first."""
    tasks = []
    for piece in pieces:
        tasks.append(asyncio.create_task(batcher.score(model, piece, later(seconds))))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
    return tasks


def test_what_waits_goes_together_in_order_within_the_budget() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        tasks = await asked(batcher, model, *map(Piece, (1, 40, 50, 20, 300, 5)))
        model.go.set()
        assert await asyncio.gather(*tasks) == [[0.01], [0.4], [0.5], [0.2], [3.0], [0.05]]
        assert model.batches == [[1], [40, 50], [20], [300], [5]]

    played(act)


def test_a_batch_is_of_one_model() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        other = Slow("m@2", go=model.go)
        tasks = await asked(batcher, model, Piece(1))
        for of, tokens in ((model, 2), (other, 3), (model, 4), (other, 5)):
            tasks += await asked(batcher, of, Piece(tokens))
        model.go.set()
        await asyncio.gather(*tasks)
        assert (model.batches, other.batches) == ([[1], [2, 4]], [[3, 5]])

    played(act)


def test_beyond_the_bounds_is_refused_at_once() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        tasks = await asked(batcher, model, Piece(1), Piece(900))
        with pytest.raises(Refused, match="900 tokens wait already") as error:
            await batcher.score(model, Piece(101), later(10))  # type: ignore[arg-type]
        assert (error.value.status, error.value.headers) == (503, {"Retry-After": "1"})
        with batcher.place(later(10)), batcher.place(later(10)):
            with pytest.raises(Refused, match="2 requests wait already"), batcher.place(later(10)):
                pass
            assert batcher.accepted == 2
        assert batcher.accepted == 0
        model.go.set()
        await asyncio.gather(*tasks)

    played(act, requests=2)


def test_a_deadline_that_passes_and_a_client_that_goes_cost_the_model_nothing() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        first = await asked(batcher, model, Piece(1))
        late, gone, last = await asked(batcher, model, Piece(7), seconds=0.05) + await asked(batcher, model, Piece(8), Piece(9))
        gone.cancel()
        with pytest.raises(Refused, match="deadline passed") as error:
            await late
        assert error.value.status == 503
        model.go.set()
        await asyncio.gather(*first, last)
        assert model.batches == [[1], [9]]

    played(act)


def test_what_would_wait_too_long_is_not_accepted() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        (first,) = await asked(batcher, model, Piece(1))
        await asyncio.sleep(0.2)
        model.go.set()
        await first  # 0.2 s a token, from now on
        model.go.clear()
        tasks = await asked(batcher, model, Piece(1), Piece(100))
        assert 10 < batcher.foreseen() < 40
        with batcher.place(later(60)), pytest.raises(Refused, match="longer than the deadline") as error, batcher.place(later(5)):
            pass
        assert int(error.value.headers["Retry-After"]) >= 10
        model.go.set()
        await asyncio.gather(*tasks)

    played(act)


def test_one_that_fails_does_not_fail_those_beside_it() -> None:
    async def act(batcher: Batcher, model: Slow) -> None:
        tasks = await asked(batcher, model, Piece(1), Piece(2), Piece(3, fails=True), Piece(13))
        model.go.set()
        assert await asyncio.gather(*tasks[:2]) == [[0.01], [0.02]]
        for task, words in ((tasks[2], "the model failed"), (tasks[3], "not finite")):
            with pytest.raises(Refused, match=words) as error:
                await task
            assert error.value.status == 500

    played(act)
