"""A gzip file read from its start, in bounded memory."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from ctrsink.errors import InputError
from ctrsink.prepare.sources.files import RangeFile

_FETCH = 4 << 20  # packed bytes at a time: on S3 each is a request


def open_packed(uri: str, size: int) -> gzip.GzipFile:
    """The content of a gzip file of `size` bytes on disk or S3."""
    return gzip.GzipFile(fileobj=io.BufferedReader(RangeFile(uri, size), _FETCH))


def unpacked_lines(uri: str, size: int) -> Iterator[bytes]:
    """Its lines.

    Raises:
        InputError: it is cut off or damaged.
    """
    with whole(uri), open_packed(uri, size) as stream:
        yield from stream


@contextmanager
def whole(uri: str) -> Iterator[None]:
    """What gzip and zlib raise within, as an InputError that names the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputError(f"{uri} is not a whole gzip file") from None
