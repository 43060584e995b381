"""A study: every variant with every seed as an ordinary run, baselines beside them, and the comparison of all."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import pyarrow as pa

from ctrsink import storage
from ctrsink.config import RunSpec, StudySpec, load_study
from ctrsink.config.study import stacked_name
from ctrsink.dataset.arrow import from_parquet, pc
from ctrsink.dataset.manifest import SPLITS, read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.signal_tables import signal_columns
from ctrsink.errors import InputError
from ctrsink.evaluate.columns_alone import KEYS, lightgbm, logistic
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.run.folder import CONFIG_NAME, identities, read_result, require_same
from ctrsink.runtime.preflight import check
from ctrsink.runtime.start import start
from ctrsink.studies.compare import STUDY, compare, write_comparison
from ctrsink.studies.floors import Floor, fit_floor, item_mean, stack
from ctrsink.studies.measured import read_measured

Runs = dict[tuple[str, int], RunSpec]
"""By variant and seed, in the order in which they are trained."""
log = logging.getLogger("ctrsink.study")


def run_study(path: str, to: str | None = None) -> dict[str, Any]:
    """Train what is not trained yet, fit the baselines, compare; a study that was interrupted goes on when it is called again.

    Args:
        path: file of the study.
        to: folder in place of `StudySpec.folder`.

    Returns:
        What `compare` gives, and the `folder`, the `study` and `files`; also in study.json. Of a study that was asked to stop
        only the `folder`, why it was `stopped`, and how many runs are `finished`.

    Raises:
        InputError: the study is wrong, or its folder holds runs of another one.
    """
    study, variants = load_study(path)
    folder = to or study.folder
    runs = {
        (name, seed): spec.model_copy(update={"name": name, "seed": seed, "run_dir": storage.join(folder, name, f"seed-{seed}")})
        for seed in study.seeds
        for name, spec in variants.items()
    }
    _check(study, runs)
    data = next(iter(runs.values())).data.uri
    tables = cache(lambda: _signals(study, data))
    if study.signals is not None:
        tables()  # what is wrong with them is told now, not after hours of runs
    for number, ((name, seed), spec) in enumerate(runs.items()):
        if _finished(spec):
            continue
        log.info("%s with seed %d: run %d of %d", name, seed, number + 1, len(runs))
        result = start(spec, resume=True)
        if not result["finished"]:
            return {"folder": folder, "stopped": result["stopped"], "finished": sum(map(_finished, runs.values()))}
    floors = _floors(study, runs, folder, tables)
    some = next(iter(runs.values()))
    shown = {split: read_measured(some.run_dir, split).impressions for split in some.evaluate.splits if split != "train"}
    for floor in floors:
        fit_floor(floor, shown)
    folders = {name: [spec.run_dir for (variant, _), spec in runs.items() if variant == name] for name in variants}
    for floor in floors:
        folders.setdefault(floor.name, []).append(floor.folder)
    reference = study.compare_with or next(iter(variants))
    found = compare([own for name in study.names for own in folders[name]], study.split, folders[reference][0])
    found = {"folder": folder, "study": study.model_dump(mode="json"), **found}
    return found | {"files": write_comparison(found, folder, STUDY)}


def _check(study: StudySpec, runs: Runs) -> None:
    """Find what is wrong before the first run begins, not after hours of others."""
    needed = {study.split} | ({"valid", "test"} if study.stacked else set())
    for (name, seed), spec in runs.items():
        if missing := sorted(needed - set(spec.evaluate.splits)):
            raise InputError(f"variants.{name}: evaluate.splits lacks {missing[0]}, which the study compares or stacks on")
        if seed == study.seeds[0]:
            check(spec)
        if storage.exists(storage.join(spec.run_dir, CONFIG_NAME)):
            try:
                require_same(spec, identities(spec, read_manifest(spec.data.uri)))
            except InputError as error:
                raise InputError(f"the study was changed (give the changed one another folder, with --to): {error}") from None


def _finished(spec: RunSpec) -> bool:
    """Whether the run has trained to its end and was measured on all that it is to be measured on."""
    try:
        done = read_result(spec.run_dir)["finished"]
    except FileNotFoundError:
        return False
    return done and all(storage.exists(storage.join(spec.run_dir, FOLDER, f"{split}.parquet")) for split in spec.evaluate.splits)


def _floors(study: StudySpec, runs: Runs, folder: str, tables: Callable[[], dict[str, pa.Table]]) -> list[Floor]:
    data = next(iter(runs.values())).data.uri
    source = {"data": read_manifest(data).identity}
    signals = {} if study.signals is None else {split: _hash(storage.join(study.signals, f"{split}.parquet")) for split in SPLITS}
    floors: list[Floor] = []
    for name in study.baselines:
        at = storage.join(folder, name)
        if name == "item_mean":
            floors.append(Floor(at, name, None, data, source, lambda: item_mean(Dataset(data))))
        elif name == "logistic":
            floors.append(Floor(at, name, None, data, source | signals, lambda: (tables(), logistic(tables()))))
        else:
            for seed in study.seeds:
                fit = lambda seed=seed: (tables(), lightgbm(tables(), seed))  # noqa: E731
                floors.append(Floor(storage.join(at, f"seed-{seed}"), name, seed, data, source | signals, fit))
    for variant in study.stacked:
        for seed in study.seeds:
            spec, name = runs[variant, seed], stacked_name(variant)
            own = {split: read_measured(spec.run_dir, split) for split in ("valid", "test")}
            scores = {f"score of {split}": _hash(storage.join(spec.run_dir, FOLDER, f"{split}.parquet")) for split in own}
            fit = lambda own=own, seed=seed: stack(tables(), own, seed)  # noqa: E731
            at, seconds = storage.join(folder, name, f"seed-{seed}"), own["test"].result["seconds"]
            floors.append(Floor(at, name, seed, data, source | signals | scores, fit, seconds))
    return floors


def _signals(study: StudySpec, data: str) -> dict[str, pa.Table]:
    """The columns of the signals by split, those of events that are no impressions left out.

    Args:
        data: folder of the data set, whose own they are where the study names none.

    Raises:
        InputError: a file is missing or damaged.
    """
    tables: dict[str, pa.Table] = {}
    if study.signals is None:
        return signal_columns(Dataset(data))
    for split in SPLITS:
        path = storage.join(study.signals, f"{split}.parquet")
        again = "write them with `ctrsink data signals`"
        try:
            table = from_parquet(storage.read_bytes(path))
        except FileNotFoundError:
            raise InputError(f"signals {study.signals}: there is no {split}.parquet; {again}") from None
        except pa.ArrowException:
            raise InputError(f"{path} is damaged: {again}") from None
        if missing := [name for name in KEYS if name not in table.column_names]:
            raise InputError(f"{path} has no column {missing[0]}: {again}")
        tables[split] = table.filter(pc.is_valid(table["label"]))
    return tables


def _hash(path: str) -> str:
    return storage.sha256(storage.read_bytes(path))
