"""The one loop that repeats a request to S3 while its failure may pass, until a deadline."""

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception, stop_before_delay, wait_random_exponential

from ctrsink.errors import InputError, StorageUnavailable
from ctrsink.storage.faults import describe, is_transient

DEADLINE_VARIABLE = "CTRSINK_STORAGE_DEADLINE_S"
DEADLINE_S = 120.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0

log = logging.getLogger(__name__)
T = TypeVar("T")


def deadline_s() -> float:
    """How long one request is repeated, in seconds; 0 for a single attempt.

    Raises:
        InputError: CTRSINK_STORAGE_DEADLINE_S is set to something else than a number of seconds.
    """
    given = os.environ.get(DEADLINE_VARIABLE, str(DEADLINE_S))
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{DEADLINE_VARIABLE} is {given!r}: it must be a number of seconds, 0 or more")
    return seconds


class Patience:
    """Repeats the requests of one operation on `uri`, with exponential waits under full jitter; warns once.

    The deadline holds for each request: a large transfer may take as long as its parts get through. An attempt that has begun is
    not broken off: the last one may end up to the client's timeouts after the deadline.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self._limit, self._warned = uri, deadline_s(), False

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first attempt that succeeds.

        Raises:
            StorageUnavailable: the deadline is over; every other failure of an attempt is passed on at once.
        """
        begun = time.monotonic()
        loop = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
            stop=stop_before_delay(self._limit),
            before_sleep=self._warn,
        )
        try:
            return await loop(attempt)
        except RetryError as error:
            cause = error.last_attempt.exception() or error
        what, hint = describe(cause)
        raise StorageUnavailable(f"{self._uri}: {what}, tried for {time.monotonic() - begun:.1f} s: {hint}")

    def _warn(self, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        if failure is not None and not self._warned:
            self._warned = True
            log.warning("%s: %s; trying again for up to %g s", self._uri, describe(failure)[0], self._limit)
