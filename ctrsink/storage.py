"""One way to open, list and put files on local disk and s3://; S3 credentials come from the environment only."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from s3fs import S3FileSystem

from ctrsink.errors import InputError

# What an S3 client is made from; a change (a test, a renewed session) makes a new client.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_MAX_ATTEMPTS", "AWS_EC2_METADATA_DISABLED",
)  # fmt: skip


def is_remote(uri: str) -> bool:
    """Whether `uri` lies on S3."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """`uri`, independent of the working folder."""
    return uri if is_remote(uri) else str(_local(uri).resolve())


def sha256(content: bytes) -> str:
    """The hash as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def exists(uri: str) -> bool:
    """Whether there is a file, or a folder with something in it.

    Raises:
        InputError: as every function here, where the bucket, the credentials or the endpoint are wrong.
    """
    with _explained(uri):
        if not is_remote(uri):
            return _local(uri).exists()
        try:
            if _s3().info(_key(uri))["type"] == "file":
                return True
        except FileNotFoundError:
            _require_bucket(uri)
            return False
        # Some servers go on showing an emptied folder: only an object in it counts.
        bucket, _, key = _key(uri).partition("/")
        return _s3().call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", MaxKeys=1)["KeyCount"] > 0


def read_bytes(uri: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with _explained(uri):
        return _s3().cat_file(_key(uri)) if is_remote(uri) else _local(uri).read_bytes()


def write_bytes(uri: str, content: bytes) -> None:
    """Put a file whole or not at all; folders above it are made, an older file is replaced."""
    with _explained(uri):
        if is_remote(uri):
            _s3().pipe_file(_key(uri), content)
        else:
            _replace(_local(uri), content)


def list_files(uri: str) -> list[str]:
    """Names of the files directly in the folder `uri`, sorted; none where it does not exist."""
    return _children(uri, "file")


def list_dirs(uri: str) -> list[str]:
    """Names of the folders directly in the folder `uri`, sorted; none where it does not exist.

    Some S3 servers go on showing a folder for a while after its last file was deleted.
    """
    return _children(uri, "directory")


def delete(uri: str) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is none."""
    with _explained(uri):
        if is_remote(uri):
            keys = _keys_below(uri)
            if keys:
                _s3().rm(keys)
            else:
                _require_bucket(uri)
        elif _local(uri).is_dir():
            shutil.rmtree(_local(uri))
        else:
            _local(uri).unlink(missing_ok=True)


def upload_dir(local: str | Path, uri: str) -> None:
    """Copy every file below the folder `local` to the same place below `uri`."""
    source = Path(local)
    files = sorted(p for p in source.rglob("*") if p.is_file())
    with _explained(uri):
        if is_remote(uri):
            targets = [_key(join(uri, p.relative_to(source).as_posix())) for p in files]
            _s3().put([str(p) for p in files], targets)
        else:
            for path in files:
                target = _local(uri) / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def download_dir(uri: str, local: str | Path) -> None:
    """Copy every file below `uri` to the same place below the folder `local`.

    Raises:
        FileNotFoundError: there is nothing below `uri`.
    """
    target = Path(local)
    with _explained(uri):
        if not is_remote(uri):
            shutil.copytree(_local(uri), target, dirs_exist_ok=True)
            return
        prefix = _key(uri) + "/"
        keys = [k for k in _keys_below(uri) if k.startswith(prefix)]
        if not keys:
            raise FileNotFoundError(uri)
        _s3().get(keys, [str(target / k[len(prefix) :]) for k in keys])


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """`uri` as pyarrow, and through it Ray, wants it: a filesystem, and the path there."""
    if is_remote(uri):
        return PyFileSystem(FSSpecHandler(_s3())), _key(uri)
    return LocalFileSystem(), absolute(uri)


def _keys_below(uri: str) -> list[str]:
    """Every object that is `uri` or lies in it, as a folder; not its neighbours that merely begin alike."""
    key = _key(uri)
    found: list[str] = _s3().find(key)
    return sorted(k for k in found if k == key or k.startswith(key + "/"))


def _children(uri: str, kind: str) -> list[str]:
    with _explained(uri):
        if not is_remote(uri):
            folder = _local(uri)
            wanted = Path.is_file if kind == "file" else Path.is_dir
            return sorted(p.name for p in folder.iterdir() if wanted(p)) if folder.is_dir() else []
        try:
            entries: list[dict[str, Any]] = _s3().ls(_key(uri), detail=True)
        except FileNotFoundError:
            _require_bucket(uri)
            return []
        prefix = _key(uri) + "/"
        names = (e["name"].removeprefix(prefix) for e in entries if e["type"] == kind and e["name"].startswith(prefix))
        return sorted(n for n in names if n)


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, and a crash leaves one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp keeps others out; a data set may be shared
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _local(uri: str) -> Path:
    path = uri.removeprefix("file://")
    if "://" in path:
        raise InputError(f"{uri}: only local paths, file:// and s3:// are supported")
    return Path(path)


def _key(uri: str) -> str:
    return uri.removeprefix("s3://").rstrip("/")


def _s3() -> Any:  # an S3FileSystem: its synchronous methods are generated, no type checker sees their results
    return _connect(os.getpid(), tuple(os.environ.get(name) for name in _ENVIRONMENT))


@lru_cache(maxsize=4)
def _connect(pid: int, environment: tuple[str | None, ...]) -> S3FileSystem:
    del pid, environment  # the key of the cache: a client survives neither a fork nor other credentials
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise InputError(f"AWS_ENDPOINT_URL {endpoint!r} is no address: it must start with http:// or https://")
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", "5"))
    files = S3FileSystem(
        endpoint_url=endpoint,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"mode": "standard", "max_attempts": attempts},
        },
    )
    files.retries = 1  # botocore retries already; two loops around each other would multiply
    return files


def _require_bucket(uri: str) -> None:
    """S3 answers "not found" for a missing bucket and a missing key alike: tell them apart."""
    bucket = _key(uri).partition("/")[0]
    try:
        _s3().call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        raise InputError(f"{uri}: the bucket {bucket} does not exist: create it, or correct the name") from None


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what the user can act on into an InputError of one line; no secret and no key id appears in it."""
    try:
        try:
            yield
        except FileNotFoundError as error:
            if is_remote(uri):
                _require_bucket(uri)
            raise FileNotFoundError(errno.ENOENT, "no such file", uri) from error
    except (NoCredentialsError, PartialCredentialsError):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where an instance role gives them"
        raise InputError(f"{uri}: no S3 credentials: {hint}") from None
    except PermissionError:
        if is_remote(uri):
            hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and their rights to this bucket"
            raise InputError(f"{uri}: S3 refused access: {hint}") from None
        raise InputError(f"{uri}: permission denied: choose another place or change its rights") from None
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{uri}: {(error.strerror or 'not a file').lower()}: choose another path") from None
    except (ConnectionError, HTTPClientError) as error:
        hint = "check AWS_ENDPOINT_URL and the network"
        raise InputError(f"{uri}: cannot reach the S3 endpoint ({type(error).__name__}): {hint}") from None
    except ParamValidationError:
        hint = "it is s3://bucket/key, the bucket in lower-case letters, digits, - and ."
        raise InputError(f"{uri}: not a valid bucket and key: {hint}") from None
    except BotoCoreError as error:
        raise InputError(f"{uri}: S3 cannot use this ({' '.join(str(error).split())})") from None
