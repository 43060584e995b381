"""Which checkpoints stay, and which one is the best: a pure rule, and the hand that deletes by it."""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence

from ctrsink import kept, storage
from ctrsink.config.train import KeepSpec
from ctrsink.errors import InputError, RunError
from ctrsink.run.listing import FOLDER, folder_of, list_checkpoints, step_of
from ctrsink.train.checkpoint.checkpoint import BEST, MARKER, STATE

log = logging.getLogger("ctrsink.train")


def to_delete(steps: Sequence[int], scores: Mapping[int, float], keep: KeepSpec, protected: Collection[int]) -> list[int]:
    """The steps whose checkpoints go, oldest first.

    Args:
        steps: of the whole checkpoints, in any order.
        scores: `keep.best` by step, of those that have it.
        protected: steps that stay whatever the rule says.
    """
    if keep.last is None:
        return []
    stay = {*sorted(set(steps))[-keep.last :], *protected, best_of(steps, scores, keep)}
    return sorted(set(steps) - stay)


def best_of(steps: Sequence[int], scores: Mapping[int, float], keep: KeepSpec) -> int | None:
    """The best of `steps` by `keep.best`, the earlier one of equals; None where no metric was asked for or known."""
    known = [step for step in sorted(steps) if math.isfinite(scores.get(step, math.nan))]
    if keep.best is None or not known:
        return None
    sign = 1 if keep.best == "logloss" else -1
    return min(known, key=lambda step: sign * scores[step])


class Keeper:
    """Applies `keep` to the checkpoints of a run; one process at a time may."""

    def __init__(self, run_dir: str, keep: KeepSpec) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._metrics: dict[int, dict[str, float | None]] = {}  # of the checkpoints seen so far

    def apply(self, newest: int) -> None:
        """Name the best checkpoint, then delete what need not stay; `newest` is the step just saved, and stays.

        Remains of checkpoints before it that were never finished, or deleted in part, go too. What cannot be deleted now is
        warned of and goes next time: the run does not depend on it.
        """
        if self.keep.last is None and self.keep.best is None:
            return
        try:
            self._apply(newest)
        except (InputError, RunError) as error:
            log.warning("older checkpoints of %s stay for now: %s", self.run_dir, error)

    def _apply(self, newest: int) -> None:
        found = [step_of(folder) for folder in list_checkpoints(self.run_dir)]
        # Steps behind it are of a history that was given up, because they are damaged: they count for nothing.
        own = [step for step in found if step <= newest]
        whole = [step for step in own if storage.exists(storage.join(folder_of(self.run_dir, step), MARKER))]
        self._metrics.pop(newest, None)  # it may have replaced another of its step
        scores = self._scores(whole)
        best = best_of(whole, scores, self.keep)
        if best is not None:
            entry = {"step": best, "metric": self.keep.best, "value": scores[best]}
            storage.write_bytes(storage.join(self.run_dir, FOLDER, BEST), json.dumps(kept.stamped(entry)).encode())
        if self.keep.last is None:
            return
        remains = [step for step in found if step < newest and step not in whole]
        for step in [*remains, *to_delete(whole, scores, self.keep, {newest})]:
            folder = folder_of(self.run_dir, step)
            storage.delete(storage.join(folder, MARKER))  # first: what is left when this is cut off is no checkpoint
            storage.delete(folder)

    def _scores(self, steps: list[int]) -> dict[int, float]:
        if self.keep.best is None:
            return {}
        for step in steps:
            if step not in self._metrics:
                self._metrics[step] = _metrics_of(folder_of(self.run_dir, step))
        found = {step: self._metrics[step].get(self.keep.best) for step in steps}
        return {step: value for step, value in found.items() if value is not None}


def _metrics_of(folder: str) -> dict[str, float | None]:
    """What the checkpoint says of its validation, None of a metric without a value; nothing where it is damaged."""
    path = storage.join(folder, STATE)
    try:
        return kept.opened(json.loads(storage.read_bytes(path)), path).get("metrics", {})
    except (FileNotFoundError, ValueError):
        return {}
