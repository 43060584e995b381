"""The page of one run."""

import json
from collections.abc import Callable
from typing import Any

from ctrsink import kept, storage
from ctrsink.config import RunSpec
from ctrsink.dataset.manifest import SPLITS, read_manifest
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.report.data_section import MOST_EVENTS, data_section
from ctrsink.report.environment import environment_section, written
from ctrsink.report.look import look
from ctrsink.report.look_sections import look_sections
from ctrsink.report.measured_sections import reliability_section, slices_section
from ctrsink.report.page import Note, Page, Section
from ctrsink.report.run_sections import configuration_section, metrics_section, number, pace_section, training_section
from ctrsink.run.folder import CONFIG_NAME, PRESENCE_NAME, claimed_data, read_result, read_run
from ctrsink.run.repeats import given_up
from ctrsink.studies.compare import compare
from ctrsink.studies.measured import BASELINE_NAME, read_predictions
from ctrsink.train.observe.telemetry import read_metrics


def is_run(folder: str) -> bool:
    """Whether the folder is that of a run."""
    return storage.exists(storage.join(folder, CONFIG_NAME))


def is_measured(folder: str) -> bool:
    """Whether the folder is that of a run or of a baseline."""
    return is_run(folder) or storage.exists(storage.join(folder, BASELINE_NAME))


def run_page(folder: str, split: str, sequences: int) -> Page:
    """The page of the run in `folder`; see `write_report`."""
    spec, result = read_run(folder), result_of(folder)
    missing: dict[str, str] = {}
    try:
        rows = read_metrics(folder)
    except InputError as error:
        rows, missing["training"] = [], str(error)
    evaluations: dict[str, dict[str, Any]] = {}
    for name in SPLITS:
        try:
            if (found := _evaluation(folder, name)) is not None:
                evaluations[name] = found
        except InputError as error:
            missing[name] = str(error)
    comparisons, predictions, large = {}, {}, _is_large(spec.data.uri)
    for name in dict.fromkeys((*spec.evaluate.splits, *evaluations, split)):
        try:
            table = read_predictions(folder, name)
            predictions[name] = (table["label"].to_numpy(), table["probability"].to_numpy())
            comparisons[name] = compare([folder], name, slices=name == split and not large)
        except InputError as error:
            missing.setdefault(name, str(error))
    if split in comparisons and large:
        why = f"Left out: more than {MOST_EVENTS:,} events would be read; see `ctrsink compare`."
        slices = Section("Slices", [Note(why, missing=True)])
    elif split in comparisons:
        slices = slices_section(comparisons[split])
    else:
        slices = Section("Slices", [Note(missing[split], missing=True)])
    looked = _looked(folder, split if split in evaluations else "valid", sequences)
    claimed = claimed_data(folder)
    return Page(
        title=spec.name,
        kind="run",
        place=folder,
        cards=[_state(folder, result), *_cards(spec, result, evaluations, comparisons)],
        sections=[
            metrics_section(evaluations, comparisons, missing),
            training_section(spec, rows),
            reliability_section(predictions, {} if predictions else missing),
            slices,
            *look_sections(looked),
            pace_section(rows, result),
            or_missing("Data", lambda: data_section(spec.data.uri, () if claimed is None else (claimed,))),
            configuration_section(spec),
            environment_section(),
        ],
        written=written(),
    )


def or_missing(title: str, build: Callable[[], Section]) -> Section:
    """The section, or one in its place that says why there is none."""
    try:
        return build()
    except (InputError, RunError) as error:
        return Section(title, [Note(first_line(error), missing=True)])


def result_of(folder: str) -> dict[str, Any]:
    """What the last training process left; empty where none has ended."""
    try:
        return read_result(folder)
    except FileNotFoundError:
        return {}


def state_of(folder: str, result: dict[str, Any]) -> tuple[str, str]:
    """In a word how far a run has come, and a remark."""
    if result.get("finished"):
        return "finished", f"{result['steps']:,} steps"
    if (failure := given_up(folder)) is not None:
        return "failed", failure
    if storage.exists(storage.join(folder, PRESENCE_NAME)):
        return "unfinished", "a process trains it, or was killed: ctrsink train --resume goes on with it"
    if result.get("stopped"):
        return "stopped", f"after {result['steps']:,} steps: {result['stopped']}"
    if result:
        return "unfinished", f"{result['steps']:,} steps so far"
    return "unfinished", "no training process has ended"


def _state(folder: str, result: dict[str, Any]) -> tuple[str, str, str]:
    return ("state", *state_of(folder, result))


def _cards(
    spec: RunSpec, result: dict[str, Any], evaluations: dict[str, Any], comparisons: dict[str, Any]
) -> list[tuple[str, str, str]]:
    cards = [("model", spec.model.family, f"seed {spec.seed}")]
    for split in ("test", "valid"):
        if split in evaluations:
            between = None
            if split in comparisons:
                (variant,) = comparisons[split]["variants"].values()
                between = variant["metrics"]["auc"]["by_users"]
            remark = "" if between is None else f"{between[0]:.4f} to {between[1]:.4f}"
            cards.append((f"{split} AUC", number(evaluations[split].get("auc")), remark))
    if result.get("impressions"):
        rate = f"{result['impressions'] / result['seconds']:,.0f} a second" if result.get("seconds") else ""
        cards.append(("impressions trained on", f"{result['impressions']:,}", rate))
    return cards


def _is_large(uri: str) -> bool:
    try:
        return read_manifest(uri).events > MOST_EVENTS
    except InputError:  # said where its figures would be
        return False


def _evaluation(folder: str, split: str) -> dict[str, Any] | None:
    path = storage.join(folder, FOLDER, f"{split}.json")
    try:
        return kept.opened(json.loads(storage.read_bytes(path)), path)
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{path} is damaged: run `ctrsink evaluate --run {folder} --split {split}`") from None


def _looked(folder: str, split: str, sequences: int) -> dict[str, Any] | str:
    if not sequences:
        return "Left out, as --sequences 0 asks: the model was not loaded."
    try:
        return look(folder, split, sequences)
    except (InputError, RunError) as error:
        return first_line(error)
