"""MovieLens-100K (as published, or as the `recbole` wheel carries it) and MovieLens-1M: the same fields from each."""

import re
from dataclasses import replace

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import ColumnSpec
from ctrsink.data.events import EventLog, OnBadRow, RawRows, check_events, check_items
from ctrsink.data.sources.readers import read_content, read_delimited
from ctrsink.errors import InputError

_COLUMNS = ColumnSpec(feedback="rating")
_RATING = ["user", "item", "rating", "timestamp"]
# "Title (1995)", sometimes with what it is behind: "(V)" for a video.
_TITLE = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*(\([A-Za-z]+\))?$")


def read_movielens(folder: str, on_bad_row: OnBadRow) -> EventLog:
    """Read the ratings and the movies (`title` without its year, `year`, `genres` in lower case) of a MovieLens folder.

    Raises:
        InputError: the folder holds none of the known layouts, or a row cannot be used.
    """
    layouts = {"u.data": _published_100k, "ml-100k.inter": _recbole_100k, "ratings.dat": _published_1m}
    for name, read in layouts.items():
        if storage.exists(storage.join(folder, name)):
            ratings, movies = read(folder)
            items = check_items(movies)
            events, skipped = check_events(ratings, _COLUMNS, items.column("item").combine_chunks(), on_bad_row)
            return EventLog(events, items, skipped)
    raise InputError(f"{folder} holds no MovieLens log ({', '.join(layouts)}): get it with `ctrsink data get`")


def _published_100k(folder: str) -> tuple[RawRows, RawRows]:
    path = storage.join(folder, "u.data")
    ratings = read_delimited(path, read_content(path), "\t", _RATING, quoted=False)
    genres = [line.split("|")[0] for line in _latin1(storage.join(folder, "u.genre")).splitlines() if "|" in line]
    names = ["item", "title", "released", "video", "address", *(f"genre{i}" for i in range(len(genres)))]
    path = storage.join(folder, "u.item")
    movies = read_delimited(path, _latin1(path).encode(), "|", names, quoted=False)
    flags = np.stack([movies.table.column(f"genre{i}").to_numpy() == "1" for i in range(len(genres))], axis=1)
    words = [[genre for genre, on in zip(genres, row, strict=True) if on] for row in flags]
    return ratings, _movies(movies, _texts(movies, "title"), words)


def _recbole_100k(folder: str) -> tuple[RawRows, RawRows]:
    path = storage.join(folder, "ml-100k.inter")
    ratings = read_delimited(path, read_content(path), "\t", quoted=False)
    ratings = replace(ratings, table=_untyped(ratings.table).rename_columns(_RATING))
    path = storage.join(folder, "ml-100k.item")
    movies = read_delimited(path, read_content(path), "\t", quoted=False)
    movies = replace(movies, table=_untyped(movies.table).rename_columns(["item", "title", "year", "genres"]))
    # This copy misspells the one movie without a name, and took "(V)" for a year.
    pairs = zip(_texts(movies, "title"), _texts(movies, "year"), strict=True)
    titles = ["unknown" if year == "unkonwn" else f"{title} ({year})" for title, year in pairs]
    return ratings, _movies(movies, titles, [text.split() for text in _texts(movies, "genres")])


def _published_1m(folder: str) -> tuple[RawRows, RawRows]:
    path = storage.join(folder, "ratings.dat")
    ratings = read_delimited(path, read_content(path).replace(b"::", b"\t"), "\t", _RATING, quoted=False)
    path = storage.join(folder, "movies.dat")
    movies = read_delimited(path, _latin1(path).replace("::", "\t").encode(), "\t", ["item", "title", "genres"], quoted=False)
    return ratings, _movies(movies, _texts(movies, "title"), [text.split("|") for text in _texts(movies, "genres")])


def _movies(raw: RawRows, titles: list[str], genres: list[list[str]]) -> RawRows:
    found = [_TITLE.match(" ".join(title.split())) for title in titles]
    fields = {
        "item": raw.table.column("item"),
        "title": pa.array([m["title"] if m else " ".join(t.split()) for m, t in zip(found, titles, strict=True)]),
        "year": pa.array([m["year"] if m else "" for m in found]),
        "genres": pa.array([" ".join(names).lower() for names in genres]),
    }
    return replace(raw, table=pa.table(fields))


def _texts(raw: RawRows, column: str) -> list[str]:
    return [text or "" for text in raw.table.column(column).to_pylist()]


def _untyped(table: pa.Table) -> pa.Table:
    """Drop the type behind a column's name: `user_id:token` -> `user_id`."""
    return table.rename_columns([name.partition(":")[0] for name in table.column_names])


def _latin1(path: str) -> str:
    return read_content(path).decode("latin-1")
