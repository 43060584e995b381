"""Which files of requests there are at a place: a file, a folder, or a pattern."""

import re
from dataclasses import dataclass
from typing import Literal

from fsspec.utils import glob_translate

from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.prepare.sources.files import infos_at
from ctrsink.prepare.sources.readers import kind_of

_PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class RequestFile:
    """A file of requests, and what tells it from a later one of the same name."""

    uri: str
    bytes: int
    version: str
    kind: Literal["jsonl", "parquet"]

    @property
    def packed(self) -> bool:
        """Whether it can be read from its start only."""
        return self.uri.endswith(".gz")


def is_one_plain_file(place: str) -> bool:
    """Whether `place` names just one file of lines that are not packed; whether it is there is not looked at."""
    return not (is_pattern(place) or place.endswith((".parquet", ".gz", "/")) or is_folder(place))


def is_pattern(place: str) -> bool:
    """Whether `place` has a wildcard and is not the name of a file that is there."""
    return _PATTERN.search(place) is not None and not storage.exists(place)


def is_folder(place: str) -> bool:
    """Whether there is something at `place` that is no file."""
    try:
        storage.info(place)
    except FileNotFoundError:
        return storage.exists(place)
    return False


def request_files(place: str) -> list[RequestFile]:
    """The files at `place`, local or s3://, by path.

    Of a folder these are all that are not hidden; of a pattern (`*`, `?`, `[...]`, and `**` for any folders) all that it fits.

    Raises:
        InputError: there is none, or one that is neither jsonl (also .gz) nor Parquet.
    """
    if is_pattern(place):
        folder = place[: _PATTERN.search(place).start()].rpartition("/")[0] or ("/" if place[0] == "/" else ".")  # pyright: ignore[reportOptionalMemberAccess]
        whole = place if folder != "." or place.startswith("./") else f"./{place}"
        fits = re.compile(glob_translate(whole)).match
        found = [(uri, info) for uri, info in infos_at(folder) if fits(uri)]
        if not found:
            raise InputError(f"{place}: no file fits this pattern")
    else:
        found = infos_at(place)
    return [RequestFile(uri, info.bytes, info.version, _kind(uri)) for uri, info in found]


def _kind(uri: str) -> Literal["jsonl", "parquet"]:
    if uri.endswith((".csv", ".csv.gz")) or (kind := kind_of(uri)) == "csv":
        raise InputError(f"{uri}: requests are nested, so a file of them is .jsonl (also .gz) or .parquet")
    return "parquet" if kind == "parquet" else "jsonl"
