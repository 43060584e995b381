"""The files of a raw log: which there are, and their bytes by ranges; what is missing or damaged is named."""

import gzip
import io
import zlib
from collections.abc import Sequence
from typing import Any

from ctrsink import storage
from ctrsink.errors import InputError, did_you_mean, listed
from ctrsink.storage import Info

HEAD = 1 << 20  # bytes that are looked at to learn a file's columns


class EmptyFile(InputError):
    """A file that holds nothing; among others it may be left out."""


def size_of(uri: str) -> int:
    """Bytes of a file of the user's.

    Raises:
        EmptyFile: it is empty.
        InputError: it is missing.
    """
    try:
        size = storage.info(uri).bytes
    except FileNotFoundError:
        raise InputError(f"{uri} does not exist: correct the path") from None
    if not size:
        raise EmptyFile(f"{uri} is empty")
    return size


def require_there(uri: str) -> None:
    """Raise InputError where there is neither a file nor a folder `uri`."""
    if not storage.exists(uri):
        raise InputError(f"{uri} does not exist: correct the path")


def infos_at(uri: str) -> list[tuple[str, Info]]:
    """The file `uri`, or every file below the folder `uri`, by path: its URI, and what is known of it.

    Left out are empty files, and those that are hidden or in a hidden folder (a name that begins with a dot or an underscore, as
    `_SUCCESS`).

    Raises:
        InputError: there is nothing to read.
    """
    try:
        return [(uri, storage.info(uri))]
    except FileNotFoundError:
        found = storage.find(uri)
    if not found:
        require_there(uri)
    shown = [file for file in found if file.bytes and not any(name[0] in "._" for name in file.path.split("/"))]
    if not shown:
        raise InputError(f"{uri} is empty: the folder holds no file that has content and is not hidden")
    return [(storage.join(uri, file.path), file) for file in shown]


def files_at(uri: str) -> list[tuple[str, int]]:
    """The same as (URI, bytes)."""
    return [(path, info.bytes) for path, info in infos_at(uri)]


def read_part(uri: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file.

    Raises:
        InputError: it is gone, or shorter by now.
    """
    try:
        content = storage.read_range(uri, start, end) if end > start else b""
    except FileNotFoundError:
        raise InputError(f"{uri} does not exist: correct the path") from None
    if len(content) != end - start:
        raise InputError(f"{uri} became shorter while it was read: leave the log unchanged during the preparation")
    return content


def read_whole(uri: str) -> bytes:
    """The content of a file, unpacked where its name ends in .gz.

    Raises:
        EmptyFile: there is nothing in it but blanks.
        InputError: it is missing or no gzip file.
    """
    content = read_part(uri, 0, size_of(uri))
    if uri.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise InputError(f"{uri} is not a whole gzip file") from None
    if not content.strip():
        raise EmptyFile(f"{uri} is empty")
    return content


def read_head(uri: str) -> bytes:
    """The first HEAD bytes of a file, unpacked where its name ends in .gz.

    Raises:
        EmptyFile: there is nothing in it but blanks.
        InputError: it is missing or no gzip file, or begins with nothing but blanks.
    """
    size = size_of(uri)
    head, whole = read_part(uri, 0, min(size, HEAD)), size <= HEAD
    if uri.endswith(".gz"):
        head, ended = _unpacked_head(uri, head)
        if whole and not ended:
            raise InputError(f"{uri} is not a whole gzip file")
        whole = whole and len(head) < HEAD
    if not head.strip():
        raise EmptyFile(f"{uri} is empty") if whole else InputError(f"{uri} begins with {HEAD >> 20} MiB of blanks: remove them")
    return head


def _unpacked_head(uri: str, packed: bytes) -> tuple[bytes, bool]:
    """What the start of a gzip file holds, of all its members, HEAD bytes at most; and whether none of them is cut off there."""
    head = b""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            while len(head) < HEAD and (piece := file.read1(HEAD - len(head))):
                head += piece
    except EOFError:
        return head, False
    except (gzip.BadGzipFile, zlib.error):
        raise InputError(f"{uri} is not a whole gzip file") from None
    return head, True


def decoded(content: bytes) -> str:
    """Text in UTF-8, or else in Latin-1, as older data sets have it."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def require_columns(uri: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise InputError unless each of the `wanted` names is that of exactly one column."""
    for name in wanted:
        if names.count(name) != 1:
            how_many = "no" if name not in names else "more than one"
            hint = did_you_mean(name, names, ": ") if name not in names else ""
            raise InputError(f"{uri} has {how_many} column {name!r}; it has {listed(names)}{hint}")


class RangeFile(io.RawIOBase):
    """A file on disk or S3 that fetches only the ranges that are read."""

    def __init__(self, uri: str, size: int) -> None:
        self._uri, self._size, self._position = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._position + size, self._size)
        content = read_part(self._uri, self._position, end)
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:  # io.BufferedReader asks for it
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
