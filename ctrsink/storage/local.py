"""Files and folders on local disk."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctrsink.errors import InputError
from ctrsink.storage.places import Info

_PIECE = 16 << 20


def write(path: Path, content: bytes | memoryview, new: bool = False) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, and a crash leaves one of them.

    Raises:
        FileExistsError: the file was to be `new`, and there is one.
    """
    with appending(path, new) as write:
        write(content)


@contextmanager
def appending(path: Path, new: bool = False) -> Iterator[Callable[[bytes | memoryview], None]]:
    """The same of a content in pieces, by a function that is called with each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path, new) as handle:
        end = 0

        def append(piece: bytes | memoryview) -> None:
            nonlocal end
            write_at(handle, piece, end)
            end += len(piece)

        yield append
        os.fsync(handle)
        os.fchmod(handle, 0o644)  # mkstemp keeps others out; a data set may be shared


@contextmanager
def beside(path: Path, new: bool = False) -> Iterator[int]:
    """A new file, open to be written, that takes the place of `path` if all goes well and is removed otherwise.

    Where it must be `new`, it takes no other file's place, and of several processes one succeeds. What the system says of it
    names `path`.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            yield handle
            if new:
                path.hardlink_to(temporary)
            else:
                Path(temporary).replace(path)
        finally:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_at(handle: int, content: bytes | memoryview, start: int) -> None:
    """Write all of `content` from byte `start` on; the system itself may take a part only, as where a disk becomes full."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(handle, rest, start)
        rest, start = rest[written:], start + written


def put(source: Path, path: Path) -> None:
    """Copy a file as `write` writes: a reader sees the old one or the new one."""
    with appending(path) as write, source.open("rb") as file:
        while piece := file.read(_PIECE):
            write(piece)


def append(path: Path, content: bytes, at: int) -> None:
    """Write behind the first `at` bytes; a reader may see a part of it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is shorter: with a hole in it, it would say what nobody wrote.
    """
    handle = os.open(path, os.O_WRONLY)
    try:
        if (there := os.fstat(handle).st_size) < at:
            raise InputError(f"{path} has {there} bytes of the {at} that were written: somebody else changed it, put it back")
        write_at(handle, content, at)
        os.ftruncate(handle, at + len(content))
        os.fsync(handle)
    finally:
        os.close(handle)


def read_range(path: Path, start: int, end: int) -> bytes:
    """The bytes [start, end), fewer where the file is shorter."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(max(0, end - start))


def info(path: Path, name: str) -> Info:
    """What is known of a file, under the given name; a folder is none."""
    status = path.stat()
    if path.is_dir():
        raise FileNotFoundError(path)
    return Info(name, status.st_size, str(status.st_mtime_ns))


def find(top: Path) -> list[Info]:
    """Every file below `top`, sorted."""
    return sorted(info(p, p.relative_to(top).as_posix()) for p in files_below(top))


def files_below(top: Path) -> list[Path]:
    """Every file below `top`, sorted; links to files are such.

    Raises:
        InputError: a link, not a hidden one, leads to a folder, or nowhere: what it stands for would be left out without a word.
    """
    found = []
    for path in top.rglob("*"):
        if path.is_file():
            found.append(path)
        elif path.is_symlink() and not path.name.startswith((".", "_")):
            where = "to a folder" if path.is_dir() else "nowhere"
            raise InputError(
                f"{path} is a link that leads {where}, and is not followed: remove it, or put the files in its place"
            )
    return sorted(found)


def names(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Names of what lies directly in a folder and is wanted, sorted; none where there is no folder."""
    return sorted(p.name for p in folder.iterdir() if wanted(p)) if folder.is_dir() else []


def delete(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
    if path.resolve() == Path(path.resolve().anchor):
        raise InputError(f"{path} is the root of the disk, which is never deleted: name a folder in it")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_below(source: Path, target: Path) -> None:
    """Copy every file below the folder `source` to the same place below `target`."""
    if not source.is_dir():
        raise FileNotFoundError(source)
    for path in files_below(source):
        copy(path, target / path.relative_to(source))


def copy(source: Path, target: Path) -> None:
    """Copy a file; folders above `target` are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:  # without a name, or with both, where the copy cannot be written
        error.filename, error.filename2 = error.filename2 or error.filename or str(target), None
        raise
