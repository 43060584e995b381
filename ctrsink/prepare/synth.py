"""A synthetic click log of any size, with a taste that moves in time and a `truth.json` that says what AUC can be reached.

Every user has a favourite genre, which is drawn anew at random moments: what was clicked before such a moment misleads, and the
longer the gap since an event, the less it says. A click has probability sigmoid(BASE + LIKING * [favourite genre] + quality);
genre and quality can be read from an item's text, or, in a `hidden` log, from nothing but who clicked what.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from ctrsink import strict_json
from ctrsink.config.data import SplitSpec
from ctrsink.dataset.manifest import SPLITS
from ctrsink.errors import InputError
from ctrsink.folder import new_folder

log = logging.getLogger("ctrsink.data")

Format = Literal["csv", "parquet"]

START = 1_700_006_400  # 2023-11-15 00:00 UTC
DAY = 86_400
SPAN_DAYS = 60
FAVOURITE_DAYS = 3.0  # mean time until a favourite is drawn anew, from all genres alike; by default
SESSION_EVENTS = 10.0  # mean, geometric
PAUSE_SECONDS = 45.0  # mean between two events of a session, exponential
NIGHT = 0.6  # sessions are (1 + NIGHT) / (1 - NIGHT) times as dense at noon as at midnight
ZIPF = 1.0  # the item of popularity rank r is shown in proportion to r ** -ZIPF
UNEVEN = 1.0  # a user's sessions are in proportion to exp(UNEVEN * normal)
BASE, LIKING = -2.6, 4.0

# A noun tells the genre, an adjective the quality: what decides on a click can be read in the item's text.
NOUNS = {
    "crime": ("Alibi", "Verdict", "Heist", "Witness"),
    "nature": ("Glacier", "Meadow", "Heron", "Delta"),
    "music": ("Sonata", "Chorus", "Drummer", "Ballad"),
    "space": ("Comet", "Orbit", "Nebula", "Lander"),
    "food": ("Bakery", "Harvest", "Recipe", "Orchard"),
}
ADJECTIVES = {"Dull": -1.0, "Pale": -0.6, "Plain": -0.3, "Quiet": 0.0, "Bright": 0.3, "Fine": 0.6, "Grand": 1.0}

# Of a click, float32 [is it the favourite, adjective].
_CHANCES = (1 / (1 + np.exp(-(BASE + LIKING * np.array([[0], [1]]) + np.array(list(ADJECTIVES.values())))))).astype(np.float32)

BLOCK_EVENTS = 500_000  # drawn at a time (less than 2**20, see _order); how the log is cut into files changes nothing in it
ROW_GROUP = 100_000
BINS = 1 << 14  # of the probability, for the AUC
READERS = ("knows_favourite", "knows_history", "knows_history_without_times")


def synth(
    to: str,
    events: int,
    users: int | None = None,
    items: int | None = None,
    seed: int = 0,
    form: Format = "csv",
    file_events: int = 1_000_000,
    favourite_days: float = FAVOURITE_DAYS,
    hidden: bool = False,
) -> dict[str, Any]:
    """Write `events/part-*.csv|parquet` (user, item, timestamp, click; oldest first), `items.csv` and `truth.json` into `to`.

    The same arguments give the same bytes; `file_events` changes only where a file ends. Memory grows with users and items,
    not with events. Returns the content of `truth.json`: the rules, and for each split that `prepare.split` makes by default
    the AUC of three readers who know these rules: one who sees the favourite, one who sees a user's past events and clicks
    (the best that a model can reach), and one who sees these but not their times.

    Args:
        to: a local folder that does not exist or is empty; it appears when all is written.
        events: at least 1.
        users: default: one for 50 events. Not every one of them need appear in the log.
        items: default: one for 500 events, at least 1000.
        seed: at least 0.
        form: of the event files.
        file_events: events in a file, the last one smaller.
        favourite_days: mean time until a user's favourite is drawn anew.
        hidden: titles and genres are dealt out anew among the items, so that they say nothing of what decides on a click; the
            events are the same, and so are the readers, who know the true ones.

    Raises:
        InputError: `to` is in use or not local, the seed is negative, or `favourite_days` is not above 0.
    """
    folder = Path(to)
    if seed < 0:
        raise InputError(f"--seed {seed}: it must be 0 or more")
    if not 0 < favourite_days < float("inf"):
        raise InputError(f"--favourite-days {favourite_days:g}: it must be above 0")
    if "://" in to:
        raise InputError(f"{to}: the log is written to a local folder only")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{to} exists already: choose another folder, or delete it first")
    world = _World.make(users or max(1, events // 50), items or max(1000, events // 500), seed, favourite_days)
    truth = _Truth(events)
    with new_folder(folder) as beside:
        csv.write_csv(world.item_table(np.random.default_rng([seed, 0, 1]) if hidden else None), beside / "items.csv")
        (beside / "events").mkdir()
        tables = _tables(world, truth, events, seed)
        for number, table in enumerate(_recut(tables, file_events)):
            path = beside / "events" / f"part-{number:05d}.{form}"
            if form == "csv":
                csv.write_csv(table, path)
            else:
                pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd")
            log.info("wrote %d of %d events", min((number + 1) * file_events, events), events)
        found = {"seed": seed, "users": int((world.last_time >= 0).sum()), "items": len(world.genre)}
        result = found | truth.summary({"favourite_days": favourite_days, "hidden": hidden})
        (beside / "truth.json").write_text(strict_json.dumps(result, indent=1) + "\n", "utf-8")
    return result


@dataclass
class _World:
    """The items, and what there is to know of every user at the moment that was reached."""

    sessions: np.ndarray
    """float64 [users]: the users' shares of the sessions, summed up."""
    shown: np.ndarray
    """float64 [items]: the items' shares of the impressions by rank, summed up."""
    by_rank: np.ndarray
    """int32 [items]: the item of each rank."""
    genre: np.ndarray
    """int8 [items]."""
    noun: np.ndarray
    adjective: np.ndarray
    last_time: np.ndarray
    """int64 [users]: of the user's latest event, -1 before the first."""
    favourite: np.ndarray
    """int8 [users], at `last_time`."""
    belief: np.ndarray
    """float32 [users, 2, genres]: what the readers of the history hold the favourite to be, with and without times."""
    favourite_days: float

    @classmethod
    def make(cls, users: int, items: int, seed: int, favourite_days: float) -> "_World":
        chance = np.random.default_rng([seed, 0])
        weights = np.cumsum(np.exp(UNEVEN * chance.standard_normal(users)))
        popularity = np.cumsum(np.arange(1, items + 1) ** -ZIPF)
        return cls(
            sessions=weights / weights[-1],
            shown=popularity / popularity[-1],
            by_rank=chance.permutation(items).astype(np.int32),
            genre=chance.integers(0, len(NOUNS), items, np.int8),
            noun=chance.integers(0, len(next(iter(NOUNS.values()))), items, np.int8),
            adjective=chance.integers(0, len(ADJECTIVES), items, np.int8),
            last_time=np.full(users, -1),
            favourite=np.zeros(users, np.int8),
            belief=np.full((users, 2, len(NOUNS)), 1 / len(NOUNS), np.float32),
            favourite_days=favourite_days,
        )

    def item_table(self, dealt: np.random.Generator | None) -> pa.Table:
        """`item`, `title` and `genre`; true of the items, or dealt out among them."""
        genres, adjectives = list(NOUNS), list(ADJECTIVES)
        of = np.arange(len(self.genre)) if dealt is None else dealt.permutation(len(self.genre))
        genre, noun, adjective = self.genre[of], self.noun[of], self.adjective[of]
        words = zip(adjective.tolist(), genre.tolist(), noun.tolist(), strict=True)
        titles = [f"{adjectives[a]} {NOUNS[genres[g]][n]} {item}" for item, (a, g, n) in enumerate(words)]
        return pa.table({"item": np.arange(len(titles)), "title": titles, "genre": np.array(genres)[genre]})


@dataclass
class _Truth:
    """Clicks by split, reader and bin of the probability that the reader gives."""

    events: int
    seen: int = 0
    ends: list[int] = field(default_factory=list)
    """Times where valid and test begin, as far as they were reached."""
    first_time: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros((len(SPLITS), len(READERS), 2, BINS), np.int64))

    def add(self, timestamp: np.ndarray, click: np.ndarray, probabilities: np.ndarray) -> None:
        """Events in order of time, [N] and [readers, N]; events of one second must not be torn apart."""
        if not self.seen:
            self.first_time = int(timestamp[0])
        shares = SplitSpec().shares
        assert shares is not None
        for cut in (shares[0], sum(shares))[len(self.ends) :]:
            index = min(int(cut * self.events + 1e-6), self.events - 1) - self.seen
            if index < len(timestamp):
                self.ends.append(int(timestamp[index]))
        self.seen += len(timestamp)
        split = np.searchsorted(self.ends, timestamp, side="right")
        for reader, probability in enumerate(probabilities):
            cell = (split * 2 + click) * BINS + (probability * BINS).astype(np.int64)
            counts = np.bincount(cell, minlength=len(SPLITS) * 2 * BINS)
            self.counts[:, reader] += counts.reshape(len(SPLITS), 2, BINS)

    def summary(self, options: dict[str, Any]) -> dict[str, Any]:
        """AUC by split and reader; and the rules, of which `options` are some."""
        rules = options | {
            "zipf": ZIPF, "session_events": SESSION_EVENTS, "pause_seconds": PAUSE_SECONDS,
            "base": BASE, "liking": LIKING, "genres": list(NOUNS), "quality": ADJECTIVES,
        }  # fmt: skip
        splits = dict(zip(SPLITS, self.counts, strict=True)) | {"all": self.counts.sum(0)}
        return {
            "events": self.events,
            "first_time": self.first_time,
            "split_times": dict(zip(("train_end", "valid_end"), self.ends, strict=True)),
            "splits": {
                name: {"events": int(counts[0].sum()), "clicks": int(counts[0, 1].sum())}
                | {"auc": {reader: binned_auc(*counts[i]) for i, reader in enumerate(READERS)}}
                for name, counts in splits.items()
            },
            "rules": rules,
        }


def binned_auc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """AUC of events that are counted by bin of their score, ties half; nan with one class."""
    below = np.cumsum(negatives) - negatives / 2
    pairs = float(negatives.sum()) * float(positives.sum())
    return float((positives * below).sum() / pairs) if pairs else float("nan")


def _tables(world: _World, truth: _Truth, events: int, seed: int) -> Iterator[pa.Table]:
    """The log block after block, each a slice of time."""
    blocks = -(-events // BLOCK_EVENTS)
    later = np.empty((2, 0), np.int64)
    for block in range(blocks):
        chance = np.random.default_rng([seed, 1 + block])
        count = events * (block + 1) // blocks - events * block // blocks
        drawn = np.concatenate([later, _sessions(world, chance, count, block / blocks, (block + 1) / blocks)], axis=1)
        # What a session has left when the slice ends comes with the next one, so that blocks follow each other in time.
        early = drawn[1] < (_clock(np.array((block + 1) / blocks)) if block + 1 < blocks else np.inf)
        later, (user, timestamp) = drawn[:, ~early], drawn[:, early]
        order = _order(timestamp - START)
        yield _impressions(world, truth, chance, user[order], timestamp[order])


def _clock(share: np.ndarray) -> np.ndarray:
    """Seconds since 1970 of a share of the span, slower in the day and faster at night: int64."""
    days = share * SPAN_DAYS
    return START + (DAY * (days + NIGHT * np.sin(2 * np.pi * days) / (2 * np.pi))).astype(np.int64)


def _sessions(world: _World, chance: np.random.Generator, events: int, start: float, end: float) -> np.ndarray:
    """Users and timestamps, int64 [2, events], of sessions that begin between two shares of the span."""
    lengths = chance.geometric(1 / SESSION_EVENTS, events)
    ends = np.cumsum(lengths)
    sessions = int(np.searchsorted(ends, events)) + 1
    lengths[sessions - 1] -= ends[sessions - 1] - events
    begin = _clock(chance.uniform(start, end, sessions))
    user = np.searchsorted(world.sessions, chance.random(sessions), side="right")
    # Pauses are summed within a session: the sum so far, less that at the session's first event.
    passed = np.cumsum(chance.exponential(PAUSE_SECONDS, events))
    first = np.cumsum(lengths[:sessions]) - lengths[:sessions]
    offset = passed - np.repeat(passed[first], lengths[:sessions])
    return np.stack([np.repeat(user, lengths[:sessions]), np.repeat(begin, lengths[:sessions]) + offset.astype(np.int64)])


def _impressions(world: _World, truth: _Truth, chance: np.random.Generator, user: np.ndarray, timestamp: np.ndarray) -> pa.Table:
    """Show an item at each event [N], in order of time, and draw the click; users and truth move on."""
    count = len(user)
    item = world.by_rank[np.searchsorted(world.shown, chance.random(count), side="right")]
    by_user = _order(user)
    chronology = _Chronologies.of(world, user[by_user], timestamp[by_user])
    genre, adjective = world.genre[item[by_user]], world.adjective[item[by_user]]

    # A favourite holds from one drawing to the next: fill forward, from the state of before where none was drawn yet.
    drawn = chance.random(count) >= chronology.kept
    at = np.maximum.accumulate(np.where(drawn | chronology.first, np.arange(count), 0))
    fresh = np.where(drawn, chance.integers(0, len(NOUNS), count, np.int8), world.favourite[chronology.user])
    favourite = fresh[at]
    probability = _CHANCES[(favourite == genre).astype(np.int8), adjective]
    click = chance.random(count, np.float32) < probability

    readers = np.stack([probability, *_read_history(world.belief, chronology, genre, adjective, click).T])
    last = np.append(chronology.starts[1:], count) - 1
    world.last_time[chronology.user[last]] = chronology.timestamp[last]
    world.favourite[chronology.user[last]] = favourite[last]

    back = np.empty(count, np.int64)
    back[by_user] = np.arange(count)
    truth.add(timestamp, click[back], readers[:, back])
    return pa.table({"user": user, "item": item, "timestamp": timestamp, "click": click[back].astype(np.int8)})


@dataclass(frozen=True)
class _Chronologies:
    """The events of a block, user after user and oldest first."""

    user: np.ndarray
    timestamp: np.ndarray
    starts: np.ndarray
    """int64: where each user begins."""
    first: np.ndarray
    """bool [N]: the user's first event in the block."""
    kept: np.ndarray
    """float64 [N]: chance that the favourite was not drawn anew since the user's event before; 0 without one."""

    @classmethod
    def of(cls, world: _World, user: np.ndarray, timestamp: np.ndarray) -> "_Chronologies":
        first = np.append(True, user[1:] != user[:-1])[: len(user)]
        before = np.where(first, world.last_time[user], np.roll(timestamp, 1))
        kept = np.where(before >= 0, np.exp((before - timestamp) / (world.favourite_days * DAY)), 0.0)
        return cls(user, timestamp, np.flatnonzero(first), first, kept)


def _read_history(
    belief: np.ndarray, chronology: _Chronologies, genre: np.ndarray, adjective: np.ndarray, click: np.ndarray
) -> np.ndarray:
    """The probability of each click, float32 [N, 2], for who knows the rules, but of the favourite only what earlier clicks say.

    That is Bayes' rule, event by event; the n-th events of all users are taken at once. The second reader takes every gap for a
    mean one. `belief` [users, 2, genres] moves on.
    """
    lengths = np.diff(chronology.starts, append=len(genre))
    longest = np.argsort(-lengths, kind="stable")
    starts = chronology.starts[longest]
    users = chronology.user[starts]
    going = np.searchsorted(-lengths[longest], -np.arange(lengths.max(initial=0)), side="left")  # users with more than n events
    state = belief[users]
    rows = np.arange(2 * len(users)) * len(NOUNS)  # where each belief begins, were they one after another
    found = np.empty((len(genre), 2), np.float32)
    no, rise = _CHANCES[0, adjective, None], (_CHANCES[1] - _CHANCES[0])[adjective, None]
    # How much likelier the click, or its absence, is where the genre is the favourite.
    ratios = np.stack([(1 - _CHANCES[1]) / (1 - _CHANCES[0]), _CHANCES[1] / _CHANCES[0]])
    ratio = ratios[click.astype(np.int8), adjective, None]
    kept = np.stack([chronology.kept, np.full(len(genre), chronology.kept.mean())], axis=1).astype(np.float32)[:, :, None]
    for n, k in enumerate(going):
        event, now = starts[:k] + n, state[:k]
        now -= 1 / len(NOUNS)
        now *= kept[event]
        now += 1 / len(NOUNS)
        flat, shown = now.reshape(-1), rows[: 2 * k] + np.repeat(genre[event], 2)
        liked = flat[shown].reshape(k, 2)
        found[event] = no[event] + liked * rise[event]
        likelier = liked * ratio[event]
        flat[shown] = likelier.reshape(-1)
        now *= (1 / (1 - liked + likelier))[:, :, None]
    belief[users] = state
    return found


def _order(values: np.ndarray) -> np.ndarray:
    """The stable order of int64 values in [0, 2**43): sorting numbers is several times faster than sorting their places."""
    return np.sort(values << 20 | np.arange(len(values))) & ((1 << 20) - 1)


def _recut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows` each, the last one smaller."""
    held: list[pa.Table] = []
    for table in tables:
        held = [pa.concat_tables([*held, table])]
        while held[0].num_rows >= rows:
            yield held[0].slice(0, rows)
            held = [held[0].slice(rows)]
    if held and held[0].num_rows:
        yield held[0]
