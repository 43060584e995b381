"""The stream: position in, micro-batches out; the same global batches whatever the number of ranks and loader processes."""

import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from ctrsink import kept
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import SPLITS
from ctrsink.dataset.reader import Dataset, Shard
from ctrsink.errors import InputError
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts, split_requests
from ctrsink.stream.ahead import in_processes, read_ahead
from ctrsink.stream.budget import fill
from ctrsink.stream.order import Order, deal, dealt_in_rows
from ctrsink.stream.price import PLAIN, Price

BUILT_AT_ONCE = 512  # sequences of a rank, about
Encode = Callable[[Cuts, Layout], Sequences]
SHARDS_AT_HAND = 64  # of which it is known where each user's sequences begin: that is 8 bytes a user


class SequenceSource:
    """The sequences of one split, numbered shard by shard, user by user, piece by piece.

    Args:
        encode: the family's way from cuts to sequences.
        newest: only those of the data set's newest part: what is evaluated, as the run may have trained on days after the others.

    Raises:
        InputError: there is none.
    """

    def __init__(self, dataset: Dataset, split: str, layout: Layout, encode: Encode, newest: bool = False) -> None:
        self.dataset, self.split, self.layout, self._encode = dataset, split, layout, encode
        dataset.use(layout)
        newest = newest and len(dataset.manifest.parts) > 1
        left_out = dataset.newest.start if newest else 0
        shards = range(len(dataset.manifest.shards))
        self.per_shard = tuple(0 if shard < left_out else int(self._pieces(shard).sum()) for shard in shards)
        self._ends = np.cumsum(self.per_shard)
        self._before = ("past", *SPLITS[: SPLITS.index(split)])  # pyright: ignore[reportArgumentType]
        self._start()
        if not self._ends[-1]:
            raise InputError(f"{'the newest part of ' * newest}the data set {dataset.uri} has no impression in its {split} split")

    def _start(self) -> None:
        self._firsts = lru_cache(SHARDS_AT_HAND)(self._firsts_of)

    def __getstate__(self) -> dict[str, Any]:
        """For another process."""
        return {name: value for name, value in vars(self).items() if name != "_firsts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _pieces(self, shard: int) -> np.ndarray:
        """Sequences of each user of a shard."""
        a, b = self.dataset.first_users[shard : shard + 2].tolist()
        return -(-self.dataset.index[f"{self.split}_impressions"][a:b] // self.layout.targets)

    def _firsts_of(self, shard: int) -> np.ndarray:
        """The first sequence of each user of a shard, and the one behind the last, int64 [users + 1]."""
        return np.append(0, np.cumsum(self._pieces(shard), dtype=np.int64)) + self._ends[shard] - self.per_shard[shard]

    @property
    def parts(self) -> tuple[int, ...]:
        """Number of shards of each part of the data set."""
        owners = [shard.part for shard in self.dataset.manifest.shards]
        return tuple(owners.count(number) for number in range(len(self.dataset.manifest.parts)))

    def owners(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """User (row of the index) and number of the piece of each sequence."""
        shards = np.searchsorted(self._ends, ids, side="right")
        users, pieces = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        order = shards.argsort(kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        for shard, own in zip(numbers.tolist(), np.split(order, starts[1:]), strict=len(ids) > 0):
            firsts = self._firsts(shard)
            rows = np.searchsorted(firsts, ids[own], side="right") - 1
            users[own] = rows + self.dataset.first_users[shard]
            pieces[own] = ids[own] - firsts[rows]
        return users, pieces

    def impressions(self, ids: np.ndarray) -> np.ndarray:
        """Targets of each sequence, known without opening a shard."""
        return self._targets(*self.owners(ids))

    def at_once(self, sequences: int) -> int:
        """How many pieces make about so many sequences: one of per_request may be as many as it has impressions."""
        return max(1, sequences // self.layout.targets) if self.layout.examples == "per_request" else sequences

    def some(self) -> np.ndarray:
        """One sequence, of a user whose history is long: what a measurement of memory takes, int64 [1]."""
        ids = np.arange(min(256, sum(self.per_shard)))
        return ids[[self.lengths(ids).argmax()]]

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Events of each sequence, about: exact where every event is an impression."""
        return self.sizes(ids)[1]

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`impressions` and `lengths` of each sequence."""
        users, pieces = self.owners(ids)
        targets, past = self._targets(users, pieces), self._past(users) + pieces * self.layout.targets
        return targets, targets + np.minimum(self.layout.retrieve or self.layout.history, past)

    def costs(self, targets: np.ndarray, lengths: np.ndarray, price: Price) -> np.ndarray:
        """What computing sequences of these `sizes` takes, in events of a matrix product, as far as they tell; float64 [N]."""
        known = lengths - targets
        if self.layout.examples == "per_user":
            return price.of(targets + known)
        return targets / price.together * price.of(known + price.together)

    def sequences(self, ids: np.ndarray) -> Sequences:
        """These sequences, in any order.

        Raises:
            InputError: one of them cannot be built, see Family.encode.
        """
        return self._sequences(ids)[0]

    def build(self, ids: np.ndarray, counted: np.ndarray | None = None) -> Batch:
        """The sequences `ids` as one batch; where `counted` is False a row only fills it."""
        return self.build_all([ids], [counted])[0]

    def build_all(self, batches: list[np.ndarray], counted: list[np.ndarray | None]) -> list[Batch]:
        """As `build`, of several batches, none of them empty; together they take less time."""
        ids = np.concatenate(batches)
        built, of, users = self._sequences(ids)
        rows = of.argsort(kind="stable")
        firsts = np.cumsum([0, *(len(batch) for batch in batches)])
        bounds = np.searchsorted(of[rows], firsts).tolist()
        out = []
        for first, a, b, which in zip(firsts.tolist(), bounds, bounds[1:], counted, strict=False):
            own = of[rows[a:b]]
            out.append(collate(built, rows[a:b], users[own], None if which is None else which[own - first]))
        return out

    def build_within(
        self, groups: list[np.ndarray], counted: list[np.ndarray | None], tokens: int
    ) -> list[tuple[list[Batch], Batch]]:
        """Each group of ids as batches of `tokens` at most, and a batch that is not counted, of the group's shortest sequence.

        A group that is not counted has no other.
        """
        built, of, users = self._sequences(np.concatenate(groups))
        lengths = built.lengths
        ends = np.cumsum([len(group) for group in groups])
        out = []
        all_rows = np.split(of.argsort(kind="stable"), np.searchsorted(np.sort(of), ends)[:-1])
        for rows, which in zip(all_rows, counted, strict=True):
            parts = [rows[chosen] for chosen in fill(lengths[rows], tokens, built.padded)] if which is None else []
            shortest = rows[[lengths[rows].argmin()]]
            none = collate(built, shortest, users[of[shortest]], np.zeros(1, np.bool_))
            out.append(([collate(built, part, users[of[part]]) for part in parts], none))
        return out

    def _sequences(self, ids: np.ndarray) -> tuple[Sequences, np.ndarray, np.ndarray]:
        """The sequences of all ids, in any order; which id (its place in `ids`) each is of; the user of each id."""
        users, pieces = self.owners(ids)
        shards = self.dataset.index["shard"][users]
        by_shard = shards.argsort(kind="stable")
        numbers, starts = np.unique(shards[by_shard], return_index=True)
        self.dataset.use(self.layout)  # another source may have used it since
        opened = self.dataset.shards(numbers.tolist())
        cuts = self._cuts(opened, np.append(starts[1:], len(ids)) - starts, users[by_shard], pieces[by_shard])
        owner = np.arange(len(ids))
        if self.layout.examples == "per_request":
            cuts, owner = split_requests(cuts)
        return self._encode(cuts, self.layout), by_shard[owner], users

    def _cuts(self, shards: list[Shard], sizes: np.ndarray, users: np.ndarray, pieces: np.ndarray) -> Cuts:
        """These pieces of users, `sizes[i]` of them in `shards[i]`."""
        rows, past = self.dataset.index["row"][users], self._past(users)
        bounds = np.append(0, sizes.cumsum())
        spans = [slice(a, b) for a, b in pairwise(bounds.tolist())]
        begins = np.concatenate([shard.offsets[rows[span]] for shard, span in zip(shards, spans, strict=True)])
        # Searched for in their own type: numpy would convert the whole list otherwise.
        opens = (begins + past).astype(np.int32)
        firsts = np.concatenate([shard.impressions.searchsorted(opens[span]) for shard, span in zip(shards, spans, strict=True)])
        counts = self._targets(users, pieces)
        offsets = np.append(0, counts.cumsum())
        places = ranges(firsts + pieces * self.layout.targets, counts)
        found = [shard.impressions[places[a:b]] for shard, (a, b) in zip(shards, pairwise(offsets[bounds].tolist()), strict=True)]
        return Cuts(list(shards), sizes, begins, Ragged(np.concatenate(found).astype(np.int64), offsets))

    def _targets(self, users: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        impressions = self.dataset.index[f"{self.split}_impressions"][users]
        return np.minimum(self.layout.targets, impressions - pieces * self.layout.targets)

    def _past(self, users: np.ndarray) -> np.ndarray:
        """Events of each of the users before those of the split."""
        return np.add.reduce([self.dataset.index[f"{name}_events"][users] for name in self._before])


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimiser step."""

    micro_batches: list[Batch]
    impressions: int
    """Of the global batch, over all ranks."""
    position: int
    """Of the stream after this step."""
    filler: Batch | None = None
    """Under a token budget ranks may need different numbers of micro-batches: this one is not counted and evens them out."""


class TrainStream:
    """Steps of a global batch each, striped over ranks; iterating goes on from the position, which is the whole state.

    Every rank gets the same number of steps with the same number of micro-batches in each, and sequences that cost about as much
    as those of any other. A global batch that ranks and micro-batches do not divide is dealt out so that micro-batches differ by
    one sequence at most, and one without any holds a row that is not counted. The stream runs over epoch after epoch, and a batch
    may reach into the next, so nothing is left out at an epoch's end; in `chronological` order it ends, and what does not fill a
    last batch stays for the time when a part was appended.

    Args:
        source: what it deals out.
        seed, shuffle_shards: see Order.
        batch_size: sequences of a global batch.
        accumulation: micro-batches of a rank in a step.
        rank, world: this rank and their number.
        order: epochs over everything, or one pass over part after part.
        workers: processes that build batches; 0 for a thread. The steps are the same.
        tokens: of a micro-batch at most; their number in a step then follows from the sequences, not from `accumulation`.
        price: by which sequences are dealt out to ranks; the same on all of them.
        lockstep: ranks wait for one another in each micro-step, see `deal`.
    """

    def __init__(
        self,
        source: SequenceSource,
        seed: int,
        shuffle_shards: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        order: Literal["shuffled", "chronological"] = "shuffled",
        workers: int = 0,
        tokens: int | None = None,
        price: Price = PLAIN,
        lockstep: bool = True,
    ) -> None:
        self.source = source
        self.order = Order(source.per_shard, seed, shuffle_shards, source.parts if order == "chronological" else ())
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.workers, self.tokens, self.price, self.lockstep = workers, tokens, price, lockstep
        self.position = 0
        """Sequences consumed since the run began, over all epochs: of steps that were handed out, not of those built ahead."""

    def state_dict(self) -> dict[str, int]:
        """All that another stream, at any number of ranks, needs to go on behind the last step that was handed out."""
        return kept.stamped({"position": self.position})

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, in constant time; call it before iterating.

        Raises:
            InputError: it is the state of a newer version.
        """
        self.position = kept.opened(state, "the state of the stream")["position"]

    def __iter__(self) -> Generator[Step, None, None]:
        """Steps from the position on; without end but in chronological order."""
        left = sys.maxsize if not self.order.parts else (self.order.total - self.position) // self.batch_size
        for step in self.steps(self.position, max(0, left)):
            self.position = step.position
            yield step

    def steps(self, position: int, count: int) -> Iterator[Step]:
        """`count` steps from `position` on, built while the caller computes; the stream's own position stays."""
        # Many sequences are built in little more time than few; the first step comes alone, because it is waited for.
        size = max(1, BUILT_AT_ONCE * self.world // self.batch_size)
        chunks = min(count, 1 + -(-(count - 1) // size))
        make = partial(self._chunk, position, count, size)
        for chunk in in_processes(make, chunks, self.workers) if self.workers else read_ahead(make, chunks):
            yield from chunk

    def step(self, position: int) -> Step:
        """The step that starts at `position`."""
        return self._build([position])[0]

    def shards_of(self, position: int) -> list[str]:
        """Files that the step from `position` on reads, for messages."""
        users, _ = self.source.owners(self.order.ids(position, self.batch_size))
        shards = self.source.dataset.manifest.shards
        return [shards[number].events_file.path for number in np.unique(self.source.dataset.index["shard"][users]).tolist()]

    def _chunk(self, position: int, count: int, size: int, number: int) -> list[Step]:
        """Of `count` steps the first, for number 0, or the next `size` of the others."""
        first, end = (0, 1) if number == 0 else (1 + (number - 1) * size, 1 + number * size)
        return self._build([position + step * self.batch_size for step in range(first, min(end, count))])

    def _build(self, positions: list[int]) -> list[Step]:
        chosen: list[np.ndarray] = []
        counted: list[np.ndarray | None] = []
        impressions: list[int] = []
        for position in positions:
            ids = self.order.ids(position, self.batch_size)
            targets, lengths = self.source.sizes(ids)
            shortest = ids[[lengths.argmin()]]  # costs least
            costs = self.source.costs(targets, lengths, self.price)
            for dealt in self._dealt(lengths, costs)[self.rank]:
                some = bool((dealt >= 0).any())
                chosen.append(ids[dealt[dealt >= 0]] if some else shortest)
                counted.append(None if some else np.zeros(1, np.bool_))
            impressions.append(int(targets.sum()))
        if self.tokens is not None:
            own = self.source.build_within(chosen, counted, self.tokens)
        else:
            batches = self.source.build_all(chosen, counted)
            own = [(batches[i : i + self.accumulation], None) for i in range(0, len(batches), self.accumulation)]
        self.source.dataset.read_ahead(self.order.shards_after(positions[-1] + self.batch_size - 1))
        ends = [position + self.batch_size for position in positions]
        return [Step(made, count, end, filler) for (made, filler), count, end in zip(own, impressions, ends, strict=True)]

    def _dealt(self, lengths: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Places in the batch, -1 for none, [world, groups, micro]: a micro-batch a group, or what fills some of `tokens`."""
        if self.tokens is None:
            return deal(lengths, costs, self.world, self.accumulation, self.lockstep)
        if self.lockstep:
            return dealt_in_rows(lengths, costs, self.world)[:, None]
        return deal(lengths, costs, self.world, 1)
