"""MovieLens from its publisher, or for 100K from the archive of a Python package that carries it; verified, never half there."""

import hashlib
import http.client
import io
import logging
import subprocess
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ctrsink.errors import InputError
from ctrsink.folder import new_folder
from ctrsink.wheel import fetch_wheel

log = logging.getLogger("ctrsink.data")

LICENCE = (
    "MovieLens is free for research use and may not be redistributed; acknowledge F. M. Harper and J. A. Konstan (2015), "
    "The MovieLens Datasets: History and Context, ACM TiiS 5(4)"
)
TIMEOUT_S = 8.0  # to connect, and between two packets: a machine without internet goes on soon


@dataclass(frozen=True)
class Archive:
    """A zip file somewhere, and the members that the data set needs."""

    source: str  # an address, or a pinned requirement of a Python package
    algorithm: str
    digest: str
    members: tuple[str, ...]


_WHEEL = "recbole==1.2.1"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "movielens-100k": (
        Archive(
            f"{_GROUPLENS}/ml-100k.zip",
            "md5",  # the one that the publisher gives
            "0e33842e24a9c977be4e0107933c0723",
            ("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.genre", "ml-100k/README"),
        ),
        Archive(
            _WHEEL,
            "sha256",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ("recbole/dataset_example/ml-100k/ml-100k.inter", "recbole/dataset_example/ml-100k/ml-100k.item"),
        ),
    ),
    "movielens-1m": (
        Archive(
            f"{_GROUPLENS}/ml-1m.zip",
            "md5",
            "c4d9eecfca2ab87c1945afe126590906",
            ("ml-1m/ratings.dat", "ml-1m/movies.dat", "ml-1m/README"),
        ),
    ),
}


def download(name: str, to: str | Path, archives: tuple[Archive, ...] | None = None) -> Path:
    """Get a data set into the folder `to` and return it; a folder that is complete already is left as it is.

    Raises:
        InputError: there is no such data set, `to` holds something else, or no source could be reached.
    """
    sources = archives or ARCHIVES.get(name, ())
    if not sources:
        raise InputError(f"there is no data set {name!r} to get; there are {', '.join(ARCHIVES)}")
    folder = Path(to)
    if any(all((folder / PurePosixPath(m).name).is_file() for m in archive.members) for archive in sources):
        log.info("%s is in %s already", name, folder)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than {name}: choose an empty or a new folder")
    failures = []
    for archive in sources:
        try:
            _unpack(archive, _verified(archive), folder)
        except (
            OSError,
            http.client.HTTPException,
            subprocess.SubprocessError,
            zipfile.BadZipFile,
            KeyError,
            ValueError,
        ) as error:
            failures.append(f"{archive.source}: {_reason(error)}")
            log.info("not from %s (%s)", archive.source, _reason(error))
            continue
        log.info("got %s from %s into %s; %s", name, archive.source, folder, LICENCE)
        return folder
    raise InputError(f"cannot get {name}; tried {'; '.join(failures)}; or put its files into {folder} yourself")


def _verified(archive: Archive) -> bytes:
    if "://" not in archive.source:
        return fetch_wheel(archive.source, archive.digest)
    content = _from_address(archive.source)
    found = hashlib.new(archive.algorithm, content, usedforsecurity=False).hexdigest()
    if found != archive.digest:
        raise ValueError(f"its {archive.algorithm} is {found}, expected {archive.digest}")
    return content


def _from_address(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        return answer.read()


def _unpack(archive: Archive, content: bytes, folder: Path) -> None:
    """Put the members side by side into `folder`, all or none."""
    with new_folder(folder) as beside, zipfile.ZipFile(io.BytesIO(content)) as packed:
        for member in archive.members:
            (beside / PurePosixPath(member).name).write_bytes(packed.read(member))


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
