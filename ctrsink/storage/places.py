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


def local_path(uri: str) -> Path:
    """Where a `uri` that is not remote lies.

    Raises:
        InputError: it is of a kind that is not supported.
    """
    path = uri.removeprefix("file://")
    if "://" in path:
        raise InputError(f"{uri}: only local paths, file:// and s3:// are supported")
    return Path(path)


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of an s3:// address; the key is empty for the bucket itself."""
    bucket, _, key = uri.removeprefix("s3://").rstrip("/").partition("/")
    return bucket, key
