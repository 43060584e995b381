"""What a request may be before anything is computed of it: bytes in time, JSON, and no more than the limits allow."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ctrsink import strict_json
from ctrsink.config.serve import LimitsSpec
from ctrsink.serve.refused import Refused, shed

_DISCARDED_BYTES, _DISCARDED_SECONDS = 64 * 2**20, 2.0


class Reader:
    """Reads bodies; knows how many bytes of them lie here."""

    def __init__(self, limits: LimitsSpec) -> None:
        self.limits, self.held = limits, 0

    async def read(self, length: str | None, pieces: AsyncIterator[bytes]) -> bytes:
        """The whole body.

        Args:
            length: the header Content-Length.

        Raises:
            Refused: it is too long, or too slow, or too many are being read.
        """
        limits, body = self.limits, bytearray()
        if length is not None and length.isdecimal() and int(length[:20]) > limits.body_bytes:
            await _discard(pieces)
            raise self._too_long()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for piece in pieces:
                    if self.held + len(piece) > limits.reading_bytes:
                        raise shed("too many requests are being received at a time: try again", "reading")
                    self.held += len(piece)
                    body += piece
                    if len(body) > limits.body_bytes:
                        await _discard(pieces)
                        raise self._too_long()
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s: send it faster") from None
        finally:
            self.held -= len(body)
        return bytes(body)

    def _too_long(self) -> Refused:
        return Refused(413, f"the body has more than {self.limits.body_bytes} bytes: send fewer candidates or behaviours")


async def _discard(pieces: AsyncIterator[bytes]) -> None:
    """Read on for a moment: a client that is sending still would not see the answer, but a connection that is closed."""
    left = _DISCARDED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDED_SECONDS):
            async for piece in pieces:
                left -= len(piece)
                if left < 0:
                    return


def parse_json(body: bytes, limits: LimitsSpec) -> Any:
    """The body as JSON, within the limits.

    Raises:
        Refused: it is none, or has too much of something.
    """
    try:
        tree = json.loads(body, object_pairs_hook=strict_json.once)
    except strict_json.Twice as error:
        raise Refused(400, f"body: {error}") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise Refused(400, f"body: not a JSON object ({error})") from None
    if isinstance(tree, dict):
        for key, most in (("history", limits.history), ("candidates", limits.candidates)):
            if isinstance(tree.get(key), list) and len(tree[key]) > most:
                raise Refused(422, f"{key}: {len(tree[key])} entries are more than the {most} that are allowed")
    _check_texts(tree, limits.text)
    return tree


def _check_texts(tree: Any, most: int) -> None:
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and len(value) > most:
            raise Refused(422, f"a text of {len(value)} characters, {value[:20]!r}..., is longer than {most}, the limit")
