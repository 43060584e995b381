"""One way to open, list and put files on local disk and s3://; S3 credentials come from the environment only.

Failures of S3 that may pass are repeated until a deadline (see `retry`). Every function here raises StorageUnavailable where the
deadline is over or access is refused, another InputError where the address is wrong, and RunError where a disk fails or is full.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from ctrsink.errors import StorageUnavailable
from ctrsink.storage import local
from ctrsink.storage.faults import explained
from ctrsink.storage.places import Info, absolute, bucket_and_key, is_remote, join, leads_out, local_path, require_below, sha256
from ctrsink.storage.s3 import Operation, connect, to_info

__all__ = [
    "Info", "StorageUnavailable", "absolute", "append", "arrow_filesystem", "create", "delete", "download", "download_dir",
    "exists", "find", "info", "is_remote", "join", "leads_out", "list_dirs", "list_files", "local_path", "read_bytes",
    "read_range", "require_below", "sha256", "upload", "upload_dir", "write_bytes",
    "writing",
]  # fmt: skip


def exists(uri: str) -> bool:
    """Whether there is a file, or a folder with something in it."""
    with explained(uri):
        if not is_remote(uri):
            return local_path(uri).exists()
        s3 = Operation(uri)
        return s3.run(s3.exists())


def info(uri: str) -> Info:
    """What is known of one file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with explained(uri):
        name = uri.rpartition("/")[2]
        if not is_remote(uri):
            return local.info(local_path(uri), name)
        s3 = Operation(uri)
        entry = s3.run(s3.info(s3.key))
        if entry is None:
            raise FileNotFoundError(uri)
        return to_info(entry, name)


def find(uri: str) -> list[Info]:
    """Every file below the folder `uri`, hidden ones included, sorted by path; none where it does not exist."""
    with explained(uri):
        if not is_remote(uri):
            return local.find(local_path(uri))
        s3 = Operation(uri)
        return s3.run(s3.find())


def list_files(uri: str) -> list[str]:
    """Names of the files directly in the folder `uri`, sorted; none where it does not exist."""
    with explained(uri):
        if not is_remote(uri):
            return local.names(local_path(uri), Path.is_file)
        s3 = Operation(uri)
        return s3.run(s3.names(files=True))


def list_dirs(uri: str) -> list[str]:
    """Names of the folders directly in the folder `uri`, sorted; none where it does not exist.

    Some S3 servers go on showing a folder for a while after its last file was deleted.
    """
    with explained(uri):
        if not is_remote(uri):
            return local.names(local_path(uri), Path.is_dir)
        s3 = Operation(uri)
        return s3.run(s3.names(files=False))


def read_bytes(uri: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with explained(uri):
        if not is_remote(uri):
            return local_path(uri).read_bytes()
        s3 = Operation(uri)
        return s3.run(s3.read())


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file; fewer where it is shorter.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with explained(uri):
        if not is_remote(uri):
            return local.read_range(local_path(uri), start, end)
        s3 = Operation(uri)
        return s3.run(s3.read_range(start, end))


def create(uri: str, content: bytes) -> bool:
    """Put a small file unless there is one already; returns whether it was put. Of several at the same moment one gets true."""
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            return s3.run(s3.create(content))
        try:
            local.write(local_path(uri), content, new=True)
        except FileExistsError:
            return False
        return True


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Put a file whole or not at all; folders above it are made, an older file is replaced."""
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            s3.run(s3.write(s3.key, len(content), lambda start, end: bytes(content[start:end])))
        else:
            local.write(local_path(uri), content)


@contextmanager
def writing(uri: str) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Put a file whole or not at all, of pieces that the function it gives is called with, one behind another.

    What goes to S3 lies in the node's temporary folder until it is whole.
    """
    with explained(uri):
        if is_remote(uri):
            with tempfile.TemporaryDirectory(prefix="ctrsink-upload-") as temporary:
                whole = Path(temporary, "whole")
                with local.appending(whole) as write:
                    yield write
                upload(whole, uri)
        else:
            with local.appending(local_path(uri)) as write:
                yield write


def append(uri: str, content: bytes, at: int) -> None:
    """Put `content` behind the first `at` bytes of a local file, over what an attempt that failed left there.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is shorter than that.
    """
    with explained(uri):
        local.append(local_path(uri), content, at)


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none.

    Raises:
        InputError: it is a whole bucket, or the root of the disk.
    """
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            s3.run(s3.delete())
        else:
            local.delete(local_path(uri))


def upload(source: str | Path, uri: str) -> None:
    """Put a copy of the local file `source`, whole or not at all; folders above it are made, an older file is replaced."""
    with explained(uri):
        if is_remote(uri):
            s3, path = Operation(uri), Path(source)
            s3.run(s3.write(s3.key, path.stat().st_size, partial(local.read_range, path)))
        else:
            local.put(Path(source), local_path(uri))


def upload_dir(source: str | Path, uri: str) -> None:
    """Copy every file below the local folder `source` to the same place below `uri`."""
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            s3.run(s3.upload(Path(source)))
        else:
            local.copy_below(Path(source), local_path(uri))


def download(uri: str, target: str | Path) -> None:
    """Copy a file to the local path `target`; folders above that are made.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            s3.run(s3.download_one(Path(target)))
        else:
            local.copy(local_path(uri), Path(target))


def download_dir(uri: str, target: str | Path) -> None:
    """Copy every file below `uri` to the same place below the local folder `target`.

    Raises:
        FileNotFoundError: there is nothing below `uri`.
    """
    with explained(uri):
        if is_remote(uri):
            s3 = Operation(uri)
            s3.run(s3.download(Path(target)))
        else:
            local.copy_below(local_path(uri), Path(target))


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """`uri` as pyarrow, and through it Ray, wants it: a filesystem, which repeats requests by itself, and the path there."""
    if is_remote(uri):
        return PyFileSystem(FSSpecHandler(connect(attempts=10))), "/".join(bucket_and_key(uri)).rstrip("/")
    return LocalFileSystem(), absolute(uri)
