"""Histories of users between their requests: what the model keeps of them, bounded in bytes."""

from dataclasses import dataclass

from cachetools import LRUCache

from ctrsink.families.protocol import Kept


@dataclass
class Counts:
    """Of requests whose history was looked for."""

    hit: int = 0
    """All of it was kept."""
    extended: int = 0
    """Its beginning was: it grew, or changed at some later place."""
    missed: int = 0
    known_tokens: int = 0
    """Rows of all these histories that were kept ..."""
    computed_tokens: int = 0
    """... and that were not."""

    def add(self, known: int, tokens: int) -> None:
        self.hit += known == tokens > 0
        self.extended += 0 < known < tokens
        self.missed += known == 0
        self.known_tokens += known
        self.computed_tokens += tokens - known


class HistoryCache:
    """By user, least recently used out first; for one thread.

    Args:
        capacity: bytes of all that is kept.
        narrow: keep only what candidates read, see Kept.narrowed.
    """

    def __init__(self, capacity: int, narrow: bool = False) -> None:
        self.narrow = narrow
        self.counts = Counts()
        self._kept: LRUCache[str, Kept] = LRUCache(capacity, getsizeof=lambda kept: kept.nbytes)

    @property
    def nbytes(self) -> int:
        """What is kept now."""
        return int(self._kept.currsize)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, user: str | None) -> Kept | None:
        return None if user is None else self._kept.get(user)

    def put(self, user: str | None, kept: Kept) -> None:
        """Keep it in place of what there was; one that is larger than the whole cache is left out."""
        if user is None:
            return
        kept = kept.narrowed() if self.narrow else kept
        self._kept.pop(user, None)
        if kept.nbytes <= self._kept.maxsize:
            self._kept[user] = kept
