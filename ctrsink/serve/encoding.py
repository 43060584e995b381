"""A parsed request becomes sequences: text, tokens, signals, by the same functions as in preparation and training."""

from dataclasses import dataclass

import numpy as np

from ctrsink.config.data import TextSpec
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.shard import with_told
from ctrsink.families.facts import Wording
from ctrsink.families.registry import family_of
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.render import feedback_ids, feedback_minima, feedback_table
from ctrsink.sequences.columns import TARGETS, Sequences
from ctrsink.sequences.windows import Cuts
from ctrsink.serve.items import ItemTexts
from ctrsink.serve.load import Loaded
from ctrsink.serve.requests import Request
from ctrsink.serve.told import histories_of

CANDIDATES = 128  # of one sequence, behind one history


@dataclass(frozen=True)
class Encoded:
    """A request as the model reads it."""

    sequences: Sequences
    """The history and candidates behind it, as many as share one, in their order."""
    where: str
    """What errors name."""
    user: str | None
    """Id of the user, if the request has one."""

    @property
    def candidates(self) -> int:
        return int(self.sequences.bounds[TARGETS][-1])

    @property
    def tokens(self) -> int:
        """What it costs: rows that the model computes where nothing of it is known."""
        return int(self.sequences.lengths.sum())


class RequestEncoder:
    """Turns parsed requests into sequences.

    Args:
        loaded: the model and what belongs to it.
        items: whose tokens and vectors are remembered, at most.
    """

    def __init__(self, loaded: Loaded, items: int) -> None:
        self._knowledge = loaded.knowledge
        config = loaded.model.config
        self._text = TextSpec.model_validate(config.text)
        self.layout = Layout.load(config.layout).serving()
        self._family = family_of(self.layout.family)
        self._items = ItemTexts(loaded, self._family.reads_text, items)
        names = list(self._items.fields)
        if self._knowledge is not None:
            names += [*(field.column for field in self._knowledge.fields), "id"]
            names += [column.name for column in self._knowledge.columns if column.of == "item"]
        self.fields = list(dict.fromkeys(names))
        """Of items, that a request must have."""
        self._prefix = np.array(config.prefix_tokens, np.int64)
        self._feedback_texts: dict[str, int] = {text: number for number, text in enumerate(config.feedback_texts or ())}

    def sequences(self, request: Request) -> Sequences:
        """The history and candidates behind it, as many as may share one, in their order.

        Raises:
            InputError: an item has no text, or a feedback cannot be rendered.
        """
        count = len(request.history)
        items = [*(b.item for b in request.history), *request.candidates]
        texts, vectors = self._items.of(items)
        given = np.array([np.nan if b.feedback is None else b.feedback for b in request.history], np.float32)
        rendered = feedback_table(self._text, (), feedback_minima(self._text, given))
        feedback_rows = feedback_ids(self._text, rendered, given)
        feedbacks = self._items.feedbacks(rendered)
        moments = [*(b.timestamp for b in request.history), *[request.timestamp] * len(request.candidates)]
        timestamps = np.floor(moments).astype(np.int64)
        candidates = len(request.candidates)
        events = Events(
            texts=np.arange(count + candidates),
            feedbacks=np.append(feedback_rows.astype(np.int64), np.zeros(candidates, np.int64)),
            timestamps=timestamps,
            labels=np.zeros(count + candidates, np.int8),
            known=np.append(np.arange(count), np.full(candidates, count)),
            tokens=texts,
            vectors=vectors,
        )
        histories = histories_of(request, timestamps, self._knowledge, vectors) if self._knowledge else None
        events = with_told(events, self.layout, histories, self._known_feedbacks(rendered)[events.feedbacks])
        # What depends on the candidate's item is no history that candidates share.
        together = 1 if self.layout.depends_on_target else CANDIDATES
        chosen = np.split(np.arange(count, count + candidates), range(together, candidates, together))
        cuts = Cuts([events], np.array([len(chosen)]), np.zeros(len(chosen), np.int64), Ragged.of(chosen))
        return self._family.encode(cuts, self.layout, Wording(feedbacks, self._prefix))

    def _known_feedbacks(self, rendered: tuple[str, ...]) -> np.ndarray:
        """Of the texts of a request's feedback the numbers that the data set has for them; 0, no feedback, for a new one."""
        return np.array([self._feedback_texts.get(text, 0) for text in rendered], np.int64)
