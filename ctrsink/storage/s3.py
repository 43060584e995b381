"""Objects on S3: every request goes through one loop of retries, large objects travel in parts."""

import asyncio
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from ctrsink.errors import InputError
from ctrsink.storage import local
from ctrsink.storage.faults import ShortBody, code_of, of_one_key
from ctrsink.storage.places import Info, bucket_and_key, require_below
from ctrsink.storage.retry import DEADLINE_VARIABLE, Patience, deadline_s

PART_BYTES = 32 * 2**20
_MOST_PARTS = 10_000
_MOST_DELETED = 1000
_TOGETHER = 8  # requests of an operation under way at once: with their parts in memory

# What a client is made from; a change (a test, a renewed session) makes a new one.
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_MAX_ATTEMPTS", "AWS_EC2_METADATA_DISABLED", DEADLINE_VARIABLE,
)  # fmt: skip

T = TypeVar("T")


class Operation:
    """One thing done to `uri`; the caller runs its coroutines with `run`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, self.key = bucket_and_key(uri)
        self._files = connect(attempts=1)
        self._patience = Patience(uri)
        self._room = asyncio.Semaphore(_TOGETHER)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`, from a thread that runs no part of it."""
        return sync(self._files.loop, lambda: work)  # pyright: ignore[reportReturnType]

    async def request(self, method: str, **arguments: Any) -> dict[str, Any]:
        """The server's answer, with a body of at most PART_BYTES as bytes and None for a larger one.

        Callables among the arguments are called anew, for each attempt.
        """

        async def attempt() -> dict[str, Any]:
            async with self._room:
                client = await self._files.set_session()
                given = {name: value() if callable(value) else value for name, value in arguments.items()}
                answer: dict[str, Any] = await getattr(client, method)(Bucket=self.bucket, **given)
                for failure in answer.get("Errors", [])[:1]:
                    raise of_one_key(failure, method)
                if "Body" in answer:
                    async with answer["Body"] as body:
                        answer["Body"] = await body.read() if answer["ContentLength"] <= PART_BYTES else None
                    _check_range(answer)
                return answer

        return await self._patience.repeat(attempt)

    async def read(self) -> bytes:
        """The whole object."""
        answer = await self.request("get_object", Key=self.key)
        if answer["Body"] is not None:
            return answer["Body"]
        size, version = answer["ContentLength"], answer["ETag"]
        return b"".join(await _together(self.piece(self.key, a, b, version) for a, b in _parts(size, PART_BYTES)))

    async def piece(self, key: str, start: int, end: int, version: str | None = None) -> bytes:
        """The bytes [start, end), at most PART_BYTES, while its ETag is `version`; fewer where the object is shorter."""
        condition = {} if version is None else {"IfMatch": version}
        try:
            return (await self.request("get_object", Key=key, Range=f"bytes={start}-{end - 1}", **condition))["Body"]
        except ClientError as error:
            if code_of(error) == "InvalidRange":  # it ends before `start`
                return b""
            raise

    async def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end); fewer where the object is shorter."""
        return b"".join(await _together(self.piece(self.key, start + a, start + b) for a, b in _parts(end - start, PART_BYTES)))

    async def write(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        """Put an object of `size` bytes whole or not at all; `read(a, b)` gives the bytes [a, b)."""
        if size <= PART_BYTES:
            await self.request("put_object", Key=key, Body=lambda: read(0, size))
            return
        upload = (await self.request("create_multipart_upload", Key=key))["UploadId"]
        parts = _parts(size, max(PART_BYTES, -(-size // _MOST_PARTS)))
        try:
            tags = await _together(
                self.request("upload_part", Key=key, UploadId=upload, PartNumber=n, Body=lambda a=a, b=b: read(a, b))
                for n, (a, b) in enumerate(parts, 1)
            )
            listed = [{"PartNumber": n, "ETag": answer["ETag"]} for n, answer in enumerate(tags, 1)]
            await self._complete(key, size, UploadId=upload, MultipartUpload={"Parts": listed})
        except BaseException:
            await asyncio.shield(self._abandon(key, upload))
            raise

    async def create(self, content: bytes) -> bool:
        """Put an object unless there is one, by one conditional request; returns whether it was put."""
        # An attempt whose answer was lost is found out by its own token.
        token = secrets.token_hex(16)
        try:
            await self.request("put_object", Key=self.key, Body=content, IfNoneMatch="*", Metadata={"token": token})
        except ClientError as error:
            if code_of(error) != "PreconditionFailed":
                raise
            found = await self.request("get_object", Key=self.key)
            return found["Metadata"].get("token") == token
        return True

    async def _complete(self, key: str, size: int, **arguments: Any) -> None:
        """Make an object of the parts. Where the answer was lost, the next attempt may find that there is nothing left to do."""
        try:
            await self.request("complete_multipart_upload", Key=key, **arguments)
        except ClientError as error:
            found = await self.info(key) if code_of(error) == "NoSuchUpload" else None
            if found is None or found["Size"] != size:
                raise

    async def _abandon(self, key: str, upload: str) -> None:
        try:  # parts of an upload that nobody ends are paid for; but the failure before this one is the one to report
            client = await self._files.set_session()
            await client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
        except Exception:
            pass

    async def pages(self, prefix: str, **more: Any) -> AsyncIterator[dict[str, Any]]:
        """The pages of the objects whose keys begin with `prefix`."""
        page: dict[str, Any] = {"IsTruncated": True}
        while page["IsTruncated"]:
            go_on = {"ContinuationToken": page["NextContinuationToken"]} if "NextContinuationToken" in page else {}
            page = await self.request("list_objects_v2", Prefix=prefix, **go_on, **more)
            yield page

    async def info(self, key: str) -> dict[str, Any] | None:
        """The entry of one object in the listing: unlike a HEAD its failures come with a reason."""
        page = await self.request("list_objects_v2", Prefix=key, MaxKeys=1)  # the shortest key with a prefix comes first
        return next((entry for entry in page.get("Contents", []) if entry["Key"] == key), None)

    async def find(self) -> list[Info]:
        """Every object below, by its path there; placeholders of folders are no files.

        Raises:
            InputError: a key leads out of the folder, as a path.
        """
        prefix = f"{self.key}/" if self.key else ""
        entries = [entry async for page in self.pages(prefix) for entry in page.get("Contents", [])]
        files = [(entry, entry["Key"].removeprefix(prefix)) for entry in entries if not entry["Key"].endswith("/")]
        return sorted(to_info(entry, require_below(name, self.uri)) for entry, name in files)

    async def exists(self) -> bool:
        """Whether there is an object, or one below."""
        if self.key and await self.info(self.key):
            return True
        page = await self.request("list_objects_v2", Prefix=f"{self.key}/" if self.key else "", MaxKeys=1)
        return bool(page.get("Contents"))

    async def names(self, files: bool) -> list[str]:
        """Names of the objects, or of the folders, directly below."""
        prefix, found = f"{self.key}/" if self.key else "", []
        async for page in self.pages(prefix, Delimiter="/"):
            entries = page.get("Contents", []) if files else page.get("CommonPrefixes", [])
            found += [entry["Key" if files else "Prefix"].removeprefix(prefix).removesuffix("/") for entry in entries]
        return sorted(name for name in found if name)

    async def delete(self) -> None:
        """Remove the object and all below it, not its neighbours that merely begin alike.

        Raises:
            InputError: it is the whole bucket, or a key below leads out of it, as a path; nothing is removed then.
        """
        if not self.key:
            raise InputError(f"{self.uri} is a whole bucket, which is never deleted: name a folder in it")
        keys = [e["Key"] async for page in self.pages(self.key) for e in page.get("Contents", [])]
        keys = [{"Key": key} for key in keys if key == self.key or key.startswith(self.key + "/")]
        for entry in keys:
            require_below(entry["Key"].removesuffix("/"), self.uri)
        batches = [keys[i : i + _MOST_DELETED] for i in range(0, len(keys), _MOST_DELETED)]
        await _together(self.request("delete_objects", Delete={"Objects": batch, "Quiet": True}) for batch in batches)

    async def upload(self, source: Path) -> None:
        """Copy every file below `source` to the same place below."""
        prefix = f"{self.key}/" if self.key else ""
        found = [(path, prefix + path.relative_to(source).as_posix()) for path in local.files_below(source)]
        await _together(self.write(key, p.stat().st_size, partial(local.read_range, p)) for p, key in found)

    async def download(self, target: Path) -> None:
        """Copy every object below to the same place below `target`.

        Raises:
            FileNotFoundError: there is none.
        """
        found = await self.find()
        if not found:
            raise FileNotFoundError(self.key)
        prefix = f"{self.key}/" if self.key else ""
        await _together(self._download(prefix + one.path, one, target / one.path) for one in found)

    async def download_one(self, target: Path) -> None:
        """Copy the object to `target`.

        Raises:
            FileNotFoundError: there is none.
        """
        entry = await self.info(self.key)
        if entry is None:
            raise FileNotFoundError(self.key)
        await self._download(self.key, to_info(entry, target.name), target)

    async def _download(self, key: str, known: Info, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.beside(path) as handle:

            async def fetch(start: int, end: int) -> None:
                local.write_at(handle, await self.piece(key, start, end, f'"{known.version}"'), start)

            await _together(fetch(a, b) for a, b in _parts(known.bytes, PART_BYTES))


def to_info(entry: dict[str, Any], path: str) -> Info:
    """An entry of a listing under the given name."""
    return Info(path, int(entry["Size"]), str(entry["ETag"]).strip('"'))


def connect(attempts: int) -> S3FileSystem:
    """A client for the present process and environment, which makes at most so many attempts at a request by itself.

    Raises:
        InputError: the environment names an endpoint that is no address.
    """
    return _connect(os.getpid(), tuple(os.environ.get(name) for name in _ENVIRONMENT), attempts)


@lru_cache(maxsize=4)
def _connect(pid: int, environment: tuple[str | None, ...], attempts: int) -> S3FileSystem:
    del pid, environment  # the key of the cache: a client survives neither a fork nor other credentials
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise InputError("AWS_ENDPOINT_URL is no address: it must start with http:// or https://")
    # botocore itself knows AWS_DEFAULT_REGION only; AWS_REGION is what the other clients of AWS, and its machines, set.
    region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION") or None
    files = S3FileSystem(
        endpoint_url=endpoint,
        client_kwargs={"region_name": region},
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": max(1.0, min(60.0, deadline_s())),
            "max_pool_connections": 2 * _TOGETHER,
            "retries": {"mode": "standard", "total_max_attempts": attempts},
        },
    )
    files.retries = 1  # s3fs has a loop of its own; loops around each other would multiply
    return files


def _check_range(answer: dict[str, Any]) -> None:
    """A body that was shortened together with its Content-Length betrays itself by the range that the server names."""
    named = re.fullmatch(r"bytes (\d+)-(\d+)/.*", answer.get("ContentRange", ""))
    if named and len(answer["Body"]) != int(named[2]) - int(named[1]) + 1:
        raise ShortBody


def _parts(size: int, part: int) -> list[tuple[int, int]]:
    return [(start, min(start + part, size)) for start in range(0, size, part)]


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
