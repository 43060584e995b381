"""Names of places: plain paths, file:// and s3://."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ctrsink.errors import InputError


@dataclass(frozen=True, order=True)
class Info:
    """What is known of a file without reading it."""

    path: str
    """Relative to the folder that was asked for; of `info`, the file's name."""
    bytes: int
    version: str
    """Changes with the content: the ETag on S3, the time of change in nanoseconds on disk."""


def is_remote(uri: str) -> bool:
    """Whether `uri` lies on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """`uri`, independent of the working folder."""
    return uri if is_remote(uri) else str(local_path(uri).resolve())


def sha256(content: bytes | memoryview) -> str:
    """The hash as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def leads_out(name: str) -> bool:
    """Whether a name that somebody else chose may lead out of the folder that it is to lie in.

    So does one that is empty or absolute, and one with a part that is empty, `.` or `..`.
    """
    return "\0" in name or any(part in ("", ".", "..") for part in name.split("/"))


def require_below(name: str, where: str) -> str:
    """`name`, where it names something below the folder `where`.

    Raises:
        InputError: it may lead out of it.
    """
    if leads_out(name):
        raise InputError(f"{where} names {name[:200]!r}, which is no file below it: remove it, or take {where} from another hand")
    return name


def local_path(uri: str) -> Path:
    """Where a `uri` that is not remote lies.

    Raises:
        InputError: it is empty, or of a kind that is not supported.
    """
    path = uri.removeprefix("file://")
    if "://" in path:
        raise InputError(f"{uri}: only local paths, file:// and s3:// are supported")
    if not path or "\0" in path:
        raise InputError(f"{uri!r} is no path: give a file or a folder")
    return Path(path)


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of an s3:// address; the key is empty for the bucket itself.

    Raises:
        InputError: the key has a part that is empty, `.` or `..`, which servers and programs take for different places.
    """
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    if key and leads_out(key):
        raise InputError(f"{uri!r}: a key may have no part that is empty, . or ..: correct the address")
    return bucket, key
