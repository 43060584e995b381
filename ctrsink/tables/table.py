"""A table of embeddings: this rank's rows, their optimiser, and the gradients that wait for it."""

from functools import partial

import torch
from torch.nn import functional

from ctrsink.dist import Topology
from ctrsink.tables.exchange import Route
from ctrsink.tables.initial import initial_values
from ctrsink.tables.shares import Share, counts_by_owner, share
from ctrsink.tables.sums import RowSums, merged

EPSILON = 1e-10


class RowTable:
    """Rows of vectors, fp32, shared out over ranks; no Parameter, so that neither DeepSpeed nor a state_dict holds it.

    The optimiser is row-wise Adagrad, one number of state per row (FBGEMM's `EXACT_ROWWISE_ADAGRAD`, as DLRM is trained):
    `s += mean(g^2); row -= lr * g / (sqrt(s) + 1e-10)`. A row's first step is about as long as Adam's, later ones are shorter the
    more it has learned; a row that nothing touched owes nothing, where Adam's moments would decay. No weight decay. The gradient
    is that of the sum of all ranks' losses. That it is Adagrad, and its epsilon, are our decisions.

    Args:
        rows: of the whole table.
        width: D.
        std: standard deviation of the values at the start.
        seed: that they come from, the same on all ranks.
    """

    trained: bool = True
    """Whether lookups are to have gradients; the same on all ranks."""

    def __init__(self, rows: int, width: int, std: float, seed: int) -> None:
        self.rows, self.width, self.std, self.seed = rows, width, std, seed
        self.topology = Topology()
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        self._local = RowSums(width)
        self._collected: tuple[torch.Tensor, torch.Tensor] | None = None

    def place(self, topology: Topology) -> None:
        """Share the rows out; before it, one process has all of them.

        Raises:
            RuntimeError: values were made or read already, for other ranks.
        """
        if topology == self.topology:
            return
        if self._made is not None:
            raise RuntimeError("a table that is in use cannot be shared out anew: place it before its first lookup")
        self.topology = topology

    @property
    def own(self) -> range:
        """The rows that lie on this rank."""
        return share(self.rows, self.topology.rank, self.topology.world)

    @property
    def values(self) -> torch.Tensor:
        """[n, D], of the own rows; made from the seed when they are first used."""
        return self._state()[0]

    @property
    def squares(self) -> torch.Tensor:
        """[n], the optimiser's state: sums of mean squared gradients of the own rows."""
        return self._state()[1]

    @property
    def held(self) -> Share:
        """The own rows with their state; no copy."""
        return Share(self.rows, self.values, self.squares)

    def take(self, held: Share) -> None:
        """Hold these from now on, in place of values from the seed; on the device that they are on already no copy is made.

        Raises:
            ValueError: they are not the own rows of a table of these sizes.
        """
        fits = held.rows == self.rows and held.values.shape == (len(self.own), self.width) and len(held.squares) == len(self.own)
        if not fits:
            raise ValueError(f"{held.rows} rows of {held.values.shape[1]}, not {self.rows} of {self.width}")
        self._made = held.values.to(self.topology.device), held.squares.to(self.topology.device)

    def make(self) -> None:
        """Make the values now, not at their first use: so what memory is free afterwards is free."""
        self._state()

    def put(self, first: int, values: torch.Tensor, squares: torch.Tensor | None = None) -> None:
        """Of the rows from `first` on, set those that lie here to values [n, D] and squares [n]; without squares, to 0."""
        begin, end = max(first, self.own.start), min(first + len(values), self.own.stop)
        if begin < end:
            here, there = slice(begin - self.own.start, end - self.own.start), slice(begin - first, end - first)
            self.values[here] = values[there]
            self.squares[here] = 0.0 if squares is None else squares[there]

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Collective, on as many ranks as share the table: int64 [...] -> [..., D] fp32; every rank must call equally often.

        Backward is no collective: it keeps what this rank's rows got until `collect`. On CUDA this waits for the device, which
        alone knows how many different rows there are. Inside of what is computed anew in backward (activation checkpointing) it
        may stand only where that happens on every rank alike.
        """
        named, place = torch.unique(rows.to(self.topology.device), return_inverse=True)
        found = self._fetched(named)
        if self.trained and torch.is_grad_enabled():
            found.requires_grad_().register_post_accumulate_grad_hook(partial(self._keep, named))
        return functional.embedding(place, found).to(rows.device)

    def collect(self, divisor: float = 1.0) -> None:
        """Collective, after the last backward of a step: gradients go to the owners of their rows, which sum and divide them.

        Args:
            divisor: takes back a factor that the losses of all ranks were given.
        """
        rows, sums = self._local.take(self.topology.device)
        if self.topology.world > 1:
            route = Route.of(counts_by_owner(rows, self.rows, self.topology.world), self.topology)
            rows, sums = merged(route.there(rows), route.there(sums))
        self._collected = rows, sums.div_(divisor)

    def squared_norm(self) -> float:
        """Of what was collected for the own rows, in fp64; no number where it holds none. The sum over ranks is the table's."""
        assert self._collected is not None
        return float(torch.linalg.vector_norm(self._collected[1], dtype=torch.float64).square())

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Change the own rows that gradients were collected for; costs what these cost, however many others there are.

        Args:
            scale: a factor of the gradient, as clipping gives it.
        """
        assert self._collected is not None
        rows, gradient = self._collected
        self._collected = None
        values, squares, place = self.values, self.squares, rows - self.own.start
        gradient = gradient.mul_(scale)
        grown = squares.index_select(0, place) + gradient.square().mean(1)
        squares.index_copy_(0, place, grown)
        values.index_add_(0, place, gradient.mul_((-lr / (grown.sqrt() + EPSILON))[:, None]))

    def discard(self) -> None:
        """Forget all gradients, collected or not."""
        self._local.clear()
        self._collected = None

    def is_finite(self) -> bool:
        """Whether all values that lie here are finite numbers."""
        values = self.values
        return not values.numel() or all(bool(one.isfinite()) for one in torch.aminmax(values))

    def _fetched(self, named: torch.Tensor) -> torch.Tensor:
        """int64 [u], ascending, each once -> a copy of these rows [u, D], wherever they lie."""
        with torch.no_grad():
            if self.topology.world == 1:
                return self.values.index_select(0, named)
            route = Route.of(counts_by_owner(named, self.rows, self.topology.world), self.topology)
            asked = route.there(named)
            return route.back(self.values.index_select(0, asked - self.own.start))

    def _keep(self, named: torch.Tensor, found: torch.Tensor) -> None:
        assert found.grad is not None
        self._local.add(named, found.grad)
        found.grad = None

    def _state(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._made is None:
            count, device = len(self.own), self.topology.device
            self._made = torch.empty(count, self.width, device=device), torch.zeros(count, device=device)
            for first, block in initial_values(self.own, self.width, self.std, self.seed):
                self.put(first, torch.from_numpy(block))
        return self._made
