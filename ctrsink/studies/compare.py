"""Runs compared: every metric with its intervals, differences to a baseline, and both by slices of the impressions."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrsink import kept, storage, strict_json
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.evaluate.intervals import by_draws, by_seeds, deviation
from ctrsink.evaluate.resampling import METRICS, Resampled, draws
from ctrsink.evaluate.slices import facts, groupings
from ctrsink.report.comparison import draw_comparison
from ctrsink.studies.measured import Measured, read_measured, require_same_impressions, rows_of, variants_of

DRAWS = 1000
Variants = dict[str, list[Measured]]
Values = dict[str, list[dict[str, np.ndarray]]]
"""By variant, a mapping for each run: metric -> [1 + DRAWS], as measured and then over draws of users."""


STUDY = "study"
"""Name of the comparison that a study leaves in its folder."""


def compare(folders: Sequence[str], split: str = "test", baseline: str | None = None, slices: bool = True) -> dict[str, Any]:
    """Compare runs that were measured on the same impressions of `split`.

    Args:
        folders: of runs and baselines; those that differ in the seed alone are one variant, by its name.
        baseline: the run whose variant the others are compared with; None: the first.
        slices: wanted; every shard of the data set is read for them.

    Returns:
        Plain values: `variants` by name with `metrics` and the `difference` to the baseline, each with the mean over seeds
        and intervals `by_users` (paired bootstrap) and `by_seeds` (t, paired by seed), and what was `trained`; `slices` by
        grouping and group, or why they were left out.

    Raises:
        InputError: a folder holds no run, or runs were measured on different impressions, or cannot be told apart.
    """
    folders = [folder.rstrip("/") for folder in folders]
    if baseline is not None and baseline.rstrip("/") not in folders:
        folders = [baseline.rstrip("/"), *folders]
    runs = [read_measured(folder, split) for folder in folders]
    require_same_impressions(runs)
    variants = variants_of(runs)
    reference = runs[0 if baseline is None else folders.index(baseline.rstrip("/"))].name
    impressions = runs[0].impressions
    # The first row is the sample itself, so that every figure is computed in one way.
    weights = np.concatenate([np.ones((1, len(impressions.names)), np.uint8), draws(len(impressions.names), DRAWS)])
    table = _table(variants, reference, weights, np.arange(len(impressions.labels)))
    for name, own in variants.items():
        table[name] |= {"seeds": [run.seed for run in own], "runs": [run.folder for run in own], "trained": _trained(own)}
    return {
        "split": split,
        "impressions": len(impressions.labels),
        "positives": int((impressions.labels > 0).sum()),
        "users": len(impressions.names),
        "draws": DRAWS,
        "baseline": reference,
        "equal_budget": _equal_budget(runs),
        "variants": table,
        **(_slices(variants, reference, weights, split) if slices else {"slices": {}}),
    }


def write_comparison(found: dict[str, Any], to: str, name: str = "comparison") -> list[str]:
    """Write `<name>.json` and the figures of a comparison into the folder `to`, local or s3://; returns the files.

    Raises:
        InputError: matplotlib is not installed, or `to` is no folder.
    """
    if storage.is_remote(to):
        with tempfile.TemporaryDirectory() as folder:
            files = write_comparison(found, folder, name)
            storage.upload_dir(folder, to)
        return [storage.join(to, Path(file).name) for file in files]
    figures = draw_comparison(found, to)
    path = storage.join(to, f"{name}.json")
    storage.write_bytes(path, strict_json.dumps(kept.stamped(found), indent=1).encode())
    return [path, *figures]


def _table(variants: Variants, reference: str, weights: np.ndarray, rows: np.ndarray) -> dict[str, dict[str, Any]]:
    """Metrics and differences by variant, on the impressions `rows`."""
    values = {name: [_values(run, weights, rows) for run in own] for name, own in variants.items()}
    out: dict[str, dict[str, Any]] = {}
    for name in variants:
        out[name] = {"metrics": {metric: _summary([own[metric] for own in values[name]]) for metric in METRICS}}
        if name != reference:
            out[name]["difference"] = {
                metric: _difference(variants, name, reference, {n: [o[metric] for o in values[n]] for n in (name, reference)})
                for metric in METRICS
            }
    return out


def _values(run: Measured, weights: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    shown = run.impressions
    return Resampled(shown.labels[rows], run.probabilities[rows], shown.users[rows], len(shown.names)).over(weights)


def _summary(values: list[np.ndarray]) -> dict[str, Any]:
    """Of one metric of a variant: `values` [1 + DRAWS] of each of its runs."""
    measured = [float(own[0]) for own in values]
    mean = np.mean(values, axis=0)
    return {
        "mean": float(mean[0]),
        "deviation": deviation(measured),
        "by_users": by_draws(mean[1:]),
        "by_seeds": by_seeds(measured),
        "runs": measured,
    }


def _difference(variants: Variants, name: str, reference: str, values: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Of one metric: the variant less the baseline, over the seeds that both have, or all where chance plays no part in one."""
    pairs = [
        (own, other)
        for run, own in zip(variants[name], values[name], strict=True)
        for base, other in zip(variants[reference], values[reference], strict=True)
        if run.seed == base.seed or None in (run.seed, base.seed)
    ]
    if not pairs:  # no seed in common: unpaired means, and no interval by seeds
        mean = np.mean(values[name], axis=0) - np.mean(values[reference], axis=0)
        return {"mean": float(mean[0]), "by_users": by_draws(mean[1:]), "by_seeds": None, "pairs": 0}
    differences = [own - other for own, other in pairs]
    mean = np.mean(differences, axis=0)
    measured = [float(difference[0]) for difference in differences]
    return {"mean": float(mean[0]), "by_users": by_draws(mean[1:]), "by_seeds": by_seeds(measured), "pairs": len(pairs)}


def _trained(runs: list[Measured]) -> dict[str, Any]:
    """Means over the runs; None where nothing was written about it."""
    found: dict[str, Any] = {}
    for key in ("impressions", "steps", "seconds", "flops"):
        known = [run.result[key] for run in runs if run.result.get(key) is not None]
        found[key] = float(np.mean(known)) if len(known) == len(runs) else None
    return found


def _equal_budget(runs: Sequence[Measured]) -> bool | None:
    """Whether runs of one seed that are no baselines trained on equally many impressions, to a thousandth; None: not known.

    Seeds may differ: as many steps over another order of the sequences hold another number of impressions.
    """
    by_seed: dict[int, list[Any]] = {}
    for run in runs:
        if run.spec is not None:
            by_seed.setdefault(run.spec.seed, []).append(run.result.get("impressions"))
    if any(number is None for told in by_seed.values() for number in told):
        return None
    return all(max(told) - min(told) <= max(told) / 1000 for told in by_seed.values())


def _slices(variants: Variants, reference: str, weights: np.ndarray, split: str) -> dict[str, Any]:
    run = next(iter(variants.values()))[0]
    try:
        found = facts(Dataset(run.data, keep_shards=1), split)
        rows = rows_of(run.impressions, found.users, found.events, found.labels, run.data)
    except InputError as error:
        return {"slices": {}, "slices_left_out": str(error)}
    out: dict[str, Any] = {}
    for title, grouping in groupings(found).items():
        group = grouping.groups[rows]
        for number, name in enumerate(grouping.names):
            own = np.flatnonzero(group == number)
            if len(own):
                size = {"impressions": len(own), "users": len(np.unique(run.impressions.users[own]))}
                out.setdefault(title, {})[name] = size | {"variants": _table(variants, reference, weights, own)}
    return {"slices": out}
