"""A cache of remote data-set files on local disk, shared by all processes of a node and safe when any of them is killed."""

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ctrsink import storage
from ctrsink.config.data import CacheSpec
from ctrsink.dataset.manifest import FileEntry, read_file

log = logging.getLogger(__name__)
MAPPED_BYTES = 2**20
"""Of fewer bytes each process may as well have a copy."""
_DIGEST = 32  # bytes of a sha256, behind what is mapped


class Cache:
    """Files by their sha256 below `folder`, at most `limit_bytes` of them in total, half-written ones included.

    A file is downloaded under a lock of its own, so that no other process downloads it too, and put on disk under the lock of
    the folder: whoever holds that one may remove half-written files, for their writers are dead. The kernel releases the
    locks of a killed process. A reader needs no lock: it checks what it read, and a removed file stays readable while open.

    Args:
        folder: made when it is first needed; of what else lies there nothing is touched.
        limit_bytes: 0 turns the cache off.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        self._folder, self._limit = Path(folder), limit_bytes
        self._files, self._partial, self._locks = (self._folder / name for name in ("files", "partial", "locks"))
        self._usable = limit_bytes > 0

    @classmethod
    def of(cls, spec: CacheSpec) -> "Cache":
        """The cache that a configuration describes."""
        home = os.environ.get("XDG_CACHE_HOME", "")
        default = Path(home if Path(home).is_absolute() else Path.home() / ".cache") / "ctrsink"
        return cls(spec.dir or default, spec.limit_mib * 2**20)

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path, int]]:
        return Cache, (self._folder, self._limit)

    def read(self, uri: str, entry: FileEntry) -> bytes:
        """The content of a file of the data set `uri`, from disk if it is there; checked as `read_file` does, with its errors."""
        if not self._serves(uri, entry):
            return read_file(uri, entry)
        content = self._find(entry)
        return self._bring(uri, entry) if content is None else content

    def mapped(self, key: str, size: int, make: Callable[[], Iterable[bytes | memoryview]]) -> np.ndarray | None:
        """Bytes that are mapped and not held, read-only uint8 [size]: the processes of a node share the pages.

        They are checked now, against a hash that lies behind them. A file that is removed afterwards stays readable.

        Args:
            key: 64 hexadecimal digits that say what the bytes are.
            make: gives them in pieces, where the cache does not have them; called by one process at a time. It may read from
                the cache, but not any more while it gives the pieces.

        Returns:
            None where they are few, or the cache is off, too small, or cannot be used: whoever asks holds the bytes himself.
        """
        if size < MAPPED_BYTES or size + _DIGEST > self._limit or not self._usable:
            return None
        with self._locked(f"mapped-{key[:3]}"):
            found = self._map(key, size)
            if found is None:
                if (self._files / key).exists():
                    log.warning("a file in the cache %s is damaged: making it again", self._folder)
                self._put(key, size + _DIGEST, _with_digest(make()))
                found = self._map(key, size) if self._usable else None
            return found

    def _map(self, key: str, size: int) -> np.ndarray | None:
        """The file as it lies on disk, undamaged; that makes it the one used last."""
        path = self._files / key
        try:
            found = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError):  # there is none, or it is empty
            return None
        if len(found) != size + _DIGEST or hashlib.sha256(found[:size].data).digest() != found[size:].tobytes():
            return None
        with suppress(OSError):
            os.utime(path)
        return found[:size].view(np.ndarray)

    def _serves(self, uri: str, entry: FileEntry) -> bool:
        return self._usable and storage.is_remote(uri) and entry.bytes <= self._limit

    def _find(self, entry: FileEntry) -> bytes | None:
        """The file as it lies on disk, undamaged; that makes it the one used last."""
        path = self._files / entry.sha256
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if storage.sha256(content) != entry.sha256:
            return None
        with suppress(OSError):  # another process may have removed it meanwhile
            os.utime(path)
        return content

    def _bring(self, uri: str, entry: FileEntry) -> bytes:
        """Download the file and put it on disk, unless another process did so meanwhile."""
        with self._locked(entry.sha256[:3]):  # two files of one lock merely wait for each other
            content = self._find(entry)
            if content is None:
                if (self._files / entry.sha256).exists():
                    log.warning("a file in the cache %s is damaged: downloading %s again", self._folder, entry.path)
                content = read_file(uri, entry)
                self._put(entry.sha256, len(content), [content])
            return content

    def _put(self, name: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Put a file of `size` bytes on disk."""
        with self._locked("folder"):
            if not self._usable:
                return
            half = self._partial / name
            try:
                for folder in (self._partial, self._files):
                    folder.mkdir(exist_ok=True)
                for left in _own(self._partial):  # of a process that was killed
                    Path(left).unlink()
                self._make_room(size)
                with half.open("wb") as file:
                    for piece in pieces:
                        file.write(piece)
                half.replace(self._files / name)
            except OSError as error:
                with suppress(OSError):
                    half.unlink()
                self._give_up(error)

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used longest ago until `needed` bytes fit.

        The files are looked at only when their noted size says that they may be too many. A kill between the note and the
        file leaves the note too large, never too small.
        """
        note = self._folder / "bytes"
        try:
            total = int(note.read_text())
        except (FileNotFoundError, ValueError):
            total = self._limit
        if total + needed > self._limit:
            found = ((entry.stat(), entry.path) for entry in _own(self._files))
            known = sorted((status.st_mtime_ns, status.st_size, path) for status, path in found)
            total = sum(size for _, size, _ in known)
            some = len(known) // 20 if total + needed > self._limit else 0  # of many files, not one at each turn
            for number, (_, size, path) in enumerate(known):
                if total + needed <= self._limit and number >= some:
                    break
                Path(path).unlink()
                total -= size
        note.write_text(str(total + needed))

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock against all threads of all processes of the node; none where the folder cannot be used."""
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            self._give_up(error)
            yield
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # some network disks have no locks
                self._give_up(error)
            yield
        finally:
            with suppress(OSError):  # closing alone would leave it to a child that was forked meanwhile
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _give_up(self, error: OSError) -> None:
        if self._usable:
            self._usable = False
            log.warning("the cache %s cannot be used (%s): reading without it", self._folder, error.strerror or error)


def _with_digest(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The pieces, and behind them their hash."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def _own(folder: Path) -> list[os.DirEntry[str]]:
    """What the cache put into a folder; a file of somebody else is not for it to remove."""
    with os.scandir(folder) as found:
        return [entry for entry in found if re.fullmatch("[0-9a-f]{64}", entry.name)]
