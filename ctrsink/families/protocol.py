"""What every family of models gives, so that no other room has to know which one it works with."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest
from ctrsink.errors import InputError
from ctrsink.families.facts import Facts, Wording
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts


class Out(NamedTuple):
    """What a model gives for a batch."""

    loss: torch.Tensor
    """fp32 scalar; the sum over what the objective counts."""
    logits: torch.Tensor | None
    """fp32 [T], of the batch's targets; None where the objective is not about clicks."""
    tallies: dict[str, torch.Tensor] | None = None
    """Sums that the objective is measured by, `hits/<what>` and `of/<what>` for a share; scalars."""


class Flops(NamedTuple):
    """Of one training step."""

    matrices: int
    attention: int

    @property
    def total(self) -> int:
        return self.matrices + self.attention


class Merged(NamedTuple):
    """A trained model with what is trained beside the weights merged into them."""

    section: dict[str, Any]
    """What that leaves of the section `model`, in plain values."""
    weights: dict[str, Callable[[], torch.Tensor]]
    """By the names of the module that `rebuilt` makes; each is made when it is asked for, and need not be kept."""
    layers: int
    """How many were merged."""


class Adapter(NamedTuple):
    """A trained model as what was trained beside a base; the tensors are the module's own."""

    base: dict[str, torch.Tensor]
    """The base's weights, by the module's names."""
    weights: dict[str, torch.Tensor]
    """By PEFT's names for them."""
    own: dict[str, torch.Tensor]
    """Of what the base has no place for, by the module's names."""
    config: dict[str, Any]
    """PEFT's, as in `adapter_config.json`."""
    section: dict[str, Any]
    """The section `model`, in plain values."""
    origin: str
    """Which base."""


class Plain(NamedTuple):
    """A trained model as one of transformers' own, of which no library but that needs to know."""

    config: dict[str, Any]
    """What config.json says."""
    weights: dict[str, Callable[[], torch.Tensor]]
    """By that model's names; each is made when it is asked for."""
    shapes: dict[str, torch.Size]
    """Of these."""
    names: dict[str, str]
    """What those begin with, and what the module's begin with instead; as regular expressions."""
    section: dict[str, Any]
    """See `Merged.section`."""
    layers: int
    """How many LoRA was merged into."""


class Kept(ABC):
    """What a model keeps of one history, so that later requests need not compute it again."""

    known: int
    """Rows of the history that it holds; the others are still to be computed."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Rows of the history."""

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def narrowed(self) -> "Kept":
        """Only what candidates read of it: it serves the same history, and cannot be continued by a longer one."""


class CTRModule(nn.Module, ABC):
    """A model that a family builds. ZeRO-3: every rank runs every module equally often, whatever its batch holds."""

    mixed_precision: bool = False
    """Matrix products in bfloat16 whatever the weights are held in."""

    large: tuple[str, ...] = ()
    """Groups whose optimiser state is too large to pass through one process."""

    @abstractmethod
    def forward(self, batch: Batch, objective: Objective) -> Out: ...

    @abstractmethod
    def group_of(self, name: str) -> str:
        """The group of the parameter `name`: stages name groups, never parameters."""

    def trained_as(self, name: str, trainable: tuple[str, ...]) -> str | None:
        """The group as which a stage trains the parameter; None where it is frozen."""
        group = self.group_of(name)
        return group if group in trainable else None

    def decays(self, name: str, dimensions: int) -> bool:
        """Whether `train.weight_decay` is for the parameter `name`: matrices, no vectors and scalars."""
        return dimensions > 1

    @abstractmethod
    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        """Counts what a training step on a batch, as `drawn`, needs, with what is trained now; also under ZeRO-3."""

    def drawn(self, batch: Batch, objective: Objective, key: int) -> Batch:
        """The batch, still on the host, with what the objective draws at random; clicks draw nothing.

        Args:
            key: the same on all ranks and in all micro-batches of a step, another in the next; fixed in validation. What is drawn
                is a hash of it and of user and event, so that it does not depend on how a global batch is dealt out.
        """
        return batch

    def forgets(self, layout: Layout) -> str | None:
        """Why nothing can be kept of histories between requests; None where `begun` and `recall` can."""
        return "models of this family compute a history anew for each request"

    def narrows(self, objective: Objective) -> bool:
        """Whether candidates read less of a history than its next behaviours do, see Kept.narrowed."""
        return False

    def begun(self, sequence: Sequences, before: Kept | None) -> Kept:
        """Of the history of one sequence what is known, from what was kept of an earlier one: itself, where they are the same."""
        raise NotImplementedError

    def recall(
        self, batch: Batch, objective: Objective, histories: Sequence[Kept], of: list[int]
    ) -> tuple[torch.Tensor, Sequence[Kept]]:
        """Logits [T] as of `forward`, up to rounding, and the histories, known to their ends.

        Args:
            batch: of whole sequences, on the host.
            histories: what is known of each; a sequence is behind one of them.
            of: the number of the history of each sequence.
        """
        raise NotImplementedError

    def look(self, batch: Batch, objective: Objective, forward: Callable[[Batch, Objective], Any]) -> dict[str, float]:
        """Numbers from inside, by one forward pass without gradients or dropout; under ZeRO-3 every rank calls it alike.

        Args:
            forward: runs this model, as a DeepSpeed engine does.
        """
        return {}

    def paid(self, batch: Batch, objective: Objective) -> torch.Tensor | None:
        """What the last target of a batch of one sequence pays each behaviour of attention, [K]; None where that is not told."""
        return None


class Family(ABC):
    """One kind of model; `FAMILY` in the module `family` of its package. It has no state: its section decides.

    An exported model is rebuilt from `plain` alone: what merging leaves of the section, and the weights.
    """

    target_numbers: ClassVar[tuple[str, ...]]
    """Inputs of a batch that hold the numbers told of targets, a column each."""

    earlier_names: ClassVar[Mapping[str, str]] = {}
    """What names of parameters began with in checkpoints of earlier versions, and what they begin with now."""

    reads_text: ClassVar[bool] = True
    """Whether items are given to it as text."""

    @abstractmethod
    def layout(self, data: DataSpec, model: Any, manifest: Manifest) -> Layout:
        """What its sequences hold, in plain values, exported with the weights.

        Raises:
            InputError: the data set lacks what a signal needs.
        """

    @abstractmethod
    def encode(self, cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
        """Many sequences at once, by numpy: the one way to a batch, in training, evaluation and scoring.

        Raises:
            InputError: a `per_user` sequence would show an impression the answers of its own request.
        """

    @abstractmethod
    def check(self, run: RunSpec, manifest: Manifest, vocabulary: Callable[[], int]) -> Facts:
        """Refuse what would fail in a worker, or at some later step.

        Args:
            vocabulary: reads the data set's tokenizer, and says how many tokens it has.

        Raises:
            InputError: it would.
        """

    @abstractmethod
    def build(self, model: Any, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
        """The model, whose every random weight comes from `seed`.

        Raises:
            InputError: it cannot be built.
        """

    def shape(self, model: Any, facts: Facts, precision: str = "fp32") -> CTRModule:
        """What `build` builds, on the meta device: sizes and types, but no memory, and no weight is read.

        Raises:
            InputError: it cannot be built.
        """
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on weights of size 0
            return self.build(model, facts, 0, precision)

    @abstractmethod
    def rebuilt(self, plain: dict[str, Any], facts: Facts) -> CTRModule:
        """The model of an exported section, see `merged`, before it has its weights."""

    @abstractmethod
    def merged(self, module: CTRModule, model: Any) -> Merged:
        """The model as it is exported; `module` must live as long as its weights are asked for, and may be changed.

        Raises:
            InputError: it cannot be exported.
        """

    def adapter(self, module: CTRModule, model: Any) -> Adapter:
        """What was trained beside a pretrained base, in a module that `build` made of the section.

        Raises:
            InputError: it has no such thing.
        """
        raise InputError(f"a model of the family {model.family} has no adapter: leave out --form adapter")

    def plain(self, module: CTRModule, model: Any, objective: Objective, padding: int | None) -> Plain:
        """The model as one of transformers' own; `module` must live as long as its weights are asked for.

        Args:
            padding: the tokenizer's token for it.

        Raises:
            InputError: it computes what none of these does.
        """
        raise InputError(f"a model of the family {model.family} is no plain decoder: leave out --form plain")

    def plain_logits(self, folder: str) -> Callable[[Batch], torch.Tensor]:
        """Logits [T] of batches by transformers alone, from a folder that was written so."""
        raise NotImplementedError

    def on_base(self, model: Any, path: str | None) -> Any:
        """The section of an adapter's model, its base in a local folder: `path`, by default where the section has it.

        Raises:
            InputError: it is not on this machine.
        """
        return model

    @abstractmethod
    def described(self, module: CTRModule, model: Any, layout: Layout) -> list[str]:
        """Sentences for the model card."""

    def portable(self, model: Any) -> Any:
        """The section as any device computes it."""
        return model

    def looked(
        self, module: Any, untrained: Callable[[], CTRModule], batches: list[Batch], objective: Objective
    ) -> dict[str, Any]:
        """What the family has to show of a trained model, beside the one that it began as; plain values by name."""
        return {}

    def narrowed(self, name: str) -> bool:
        """Whether the weights `name` may be stored in bfloat16."""
        return False
