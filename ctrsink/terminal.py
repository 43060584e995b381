"""The user's terminal while a verb runs: it shows what ctrsink says, and what its libraries write goes into a file.

Libraries write from Python and from C, and Ray prints what its workers write. So the descriptors 1 and 2 lead into the file, and
so do `sys.stdout` and `sys.stderr`; `out` and `err` are the user's own. What a worker of ours logs comes with what Ray prints: it
is marked, and is shown.
"""

import faulthandler
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

MARK = "\x1f"
"""Stands before what a worker logged: a line of ours. (What separates units; Python takes 1c to 1e for ends of lines.)"""
Relay = Callable[[str], None]


def out() -> TextIO:
    """The user's stdout: of results."""
    return sys.stdout if _held is None else _held.out


def err() -> TextIO:
    """The user's stderr: of messages."""
    return sys.stderr if _held is None else _held.err


def is_quiet() -> bool:
    """Whether what libraries write is kept off the terminal."""
    return _held is not None


@contextmanager
def quiet(relay: Relay, path: Path | None = None) -> Iterator["Held"]:
    """Send what libraries write to the file `path`, or to a temporary one that is gone at the end unless somebody keeps it.

    Within another such block this one changes nothing.

    Args:
        relay: called with what followed the MARK in a line.
    """
    global _held
    if _held is not None:
        yield _held
        return
    _held = held = Held(relay, path)
    try:
        yield held
    finally:
        _held = None
        held.close()


@contextmanager
def kept_in(path: Path) -> Iterator[bool]:
    """Keep what libraries write in the file `path` meanwhile, and what they wrote before.

    Gives whether it does: not where the terminal is not quiet, or whoever made it so chose the file.
    """
    held = _held
    if held is None or held.placed:
        yield False
        return
    held.lead(path)
    try:
        yield True
    finally:
        held.lead(None)


def take_back(path: Path) -> None:
    """Take a file that was left along into the present one; it is gone where there is none."""
    if path.exists():
        if _held is not None:
            _append(path, _held.path)
        path.unlink()


def keep() -> Path | None:
    """Let the temporary file stay; None: there is none, or nothing in it."""
    if _held is None or not _held.temporary or not _size(_held.path):
        return None
    _held.temporary = False
    return _held.path


def finish() -> None:
    """The process is about to end, and the terminal stays quiet until then."""
    if _held is not None:
        _held.drop_empty()


class Held:
    """Both descriptors while they lead into a file, which is `path`."""

    def __init__(self, relay: Relay, path: Path | None) -> None:
        self.relay, self.placed = relay, path is not None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._streams = sys.stdout, sys.stderr
        self._saved = os.dup(1), os.dup(2)
        self.out, self.err = (
            _own(stream, number, kept) for stream, number, kept in zip(self._streams, (1, 2), self._saved, strict=True)
        )
        self.path = self._open(path)
        self._faults = not faulthandler.is_enabled()
        if self._faults:  # what kills the process is told to the user
            faulthandler.enable(self._saved[1])
        sys.stdout = sys.stderr = _LIBRARIES

    def lead(self, path: Path | None) -> None:
        """From now on into that file, or a temporary one; a file that is left stays where it is, if there is something in it.

        What stood in a temporary one goes along.
        """
        before, temporary = self.path, self.temporary
        self.path = self._open(path)
        if temporary and _size(before):
            _append(before, self.path)
        if temporary or not _size(before):
            before.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the terminal back."""
        sys.stdout, sys.stderr = self._streams
        try:
            self.drop_empty()
        finally:
            if self._faults:
                faulthandler.disable()
            for number, saved in enumerate(self._saved, 1):
                os.dup2(saved, number)
                os.close(saved)

    def drop_empty(self) -> None:
        """Remove the file, if it is a temporary one or nothing is in it; what is still written then is lost."""
        for stream in (self.out, self.err):
            stream.flush()
        if self.temporary or not _size(self.path):
            self.path.unlink(missing_ok=True)

    def _open(self, path: Path | None) -> Path:
        self.temporary = path is None
        if path is None:
            handle, name = tempfile.mkstemp(prefix="ctrsink-libraries-", suffix=".log")
            path = Path(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number in (1, 2):
            os.dup2(handle, number)
        os.close(handle)
        return path


class _Libraries(io.TextIOBase):
    """`sys.stdout` and `sys.stderr` of libraries; they may hold it when the terminal is no longer quiet."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._line(line)
        return len(text)

    def _line(self, line: str) -> None:
        _, *ours = line.split(MARK)
        if ours and _held is not None:
            for told in ours:  # where two threads wrote at once there are several
                _held.relay(told)
        else:
            with suppress(OSError):
                os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        with self._lock:
            if self._rest and MARK not in self._rest:
                rest, self._rest = self._rest, ""
                with suppress(OSError):
                    os.write(2, rest.encode("utf-8", "backslashreplace"))

    def fileno(self) -> int:
        return 2

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False


def _own(stream: TextIO, number: int, saved: int) -> TextIO:
    """The user's stream: one that is not of a descriptor, as in tests, is left as it is."""
    try:
        if stream.fileno() != number:
            return stream
    except (OSError, ValueError):
        return stream
    return open(saved, "w", 1, stream.encoding, "backslashreplace", closefd=False)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where somebody has deleted it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("ab") as write:
        while piece := read.read(1 << 20):
            write.write(piece)


_LIBRARIES = _Libraries()
_held: Held | None = None
