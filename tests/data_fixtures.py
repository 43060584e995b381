"""Small logs made by hand (no line of them is MovieLens'), in every layout that a source reads."""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TextSpec, TokenizerSpec

GENRES = ["unknown", "Action", "Children's", "Comedy", "Drama", "Sci-Fi"]


@dataclass(frozen=True)
class Movie:
    """A movie that never was."""

    id: int
    title: str
    year: str
    genres: tuple[str, ...]
    behind: str = ""


MOVIES = (
    Movie(1, "Paper Moonship", "1994", ("Action", "Sci-Fi")),
    Movie(2, "Mélodie perdue, La", "1961", ("Drama",)),
    Movie(3, "Two Geese (Deux oies)", "1988", ("Children's", "Comedy")),
    Movie(5, "Small Dinosaur IX", "1997", ("Children's",), " (V)"),
    Movie(6, "unknown", "", ("unknown",)),
    Movie(7, 'The "Quoted" One', "1999", ("Comedy", "Drama")),
)

Event = tuple[int, int, int, int]  # user, item, rating, timestamp


def make_events(users: int = 12, per_user: int = 9, seed: int = 0) -> list[Event]:
    """A log in random order with distinct timestamps and both labels everywhere."""
    chance = random.Random(seed)
    times = chance.sample(range(10**9, 10**9 + 10**7), users * per_user)
    pairs = [(user, chance.choice(MOVIES).id) for user in range(1, users + 1) for _ in range(per_user)]
    events = [(user, item, chance.randint(1, 5), time) for (user, item), time in zip(pairs, times, strict=True)]
    chance.shuffle(events)
    return events


def write_published_100k(folder: Path, events: list[Event]) -> Path:
    """The layout of the archive ml-100k.zip."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in events))
    (folder / "u.genre").write_text("".join(f"{name}|{n}\n" for n, name in enumerate(GENRES)) + "\n")
    lines = []
    for movie in MOVIES:
        title = f"{movie.title} ({movie.year}){movie.behind}" if movie.year else movie.title
        flags = "|".join("1" if genre in movie.genres else "0" for genre in GENRES)
        lines.append(f"{movie.id}|{title}|01-Jan-{movie.year}||http://example.org/{movie.id}|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    return folder


def write_recbole_100k(folder: Path, events: list[Event]) -> Path:
    """The layout in the recbole wheel, with its two oddities."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "ml-100k.inter").write_text(header + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in events))
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"]
    for movie in MOVIES:
        title, year = (movie.title, movie.year) if movie.year else ("unkonwn", "unkonwn")
        if movie.behind:
            title, year = f"{title} ({year})", movie.behind.strip(" ()")
        lines.append(f"{movie.id}\t{title}\t{year}\t{' '.join(movie.genres)}\n")
    (folder / "ml-100k.item").write_text("".join(lines), "utf-8")
    return folder


def write_1m(folder: Path, events: list[Event]) -> Path:
    """The layout of the archive ml-1m.zip."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in events))
    titles = (f"{m.title} ({m.year}){m.behind}" if m.year else m.title for m in MOVIES)
    lines = (f"{m.id}::{title}::{'|'.join(m.genres)}\n" for m, title in zip(MOVIES, titles, strict=True))
    (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
    return folder


COLUMNS = ColumnSpec(user="who", item="what", timestamp="when", feedback="stars", request="shown")


def event_rows(events: list[Event]) -> list[dict[str, object]]:
    """The log as a user may have it: own column names, an empty feedback, a request id."""
    rows = []
    for number, (user, item, rating, time) in enumerate(events):
        stars = None if number % 7 == 3 else rating
        rows.append({"who": f"u{user}", "what": f"i{item}", "when": time, "stars": stars, "shown": f"r{time % 5}"})
    return rows


def item_rows() -> list[dict[str, object]]:
    """The item table of the log in `event_rows`."""
    return [{"item": f"i{m.id}", "title": m.title, "year": m.year, "genres": " ".join(m.genres)} for m in MOVIES]


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as csv, jsonl or parquet, by the ending of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def table_source(folder: Path, events: list[Event], ending: str = "csv") -> SourceSpec:
    """Write the log and its items below `folder` and say how to read them."""
    log = write_table(folder / f"log.{ending}", event_rows(events))
    items = write_table(folder / f"items.{ending}", item_rows())
    return SourceSpec(kind="table", path=str(log), items=str(items), columns=COLUMNS)


def prepare_spec(source: SourceSpec, shard_events: int = 30) -> PrepareSpec:
    """A small preparation with several shards and a tokenizer of its own."""
    return PrepareSpec(
        source=source,
        text=TextSpec(item="{title} ({year})"),
        tokenizer=TokenizerSpec(train_vocabulary=300),
        split=SplitSpec(train=0.7, valid=0.15),
        shard_events=shard_events,
    )
