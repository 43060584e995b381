"""The page of a study, or of any folder of runs and baselines."""

import json
import re
from functools import partial
from typing import Any

from ctrsink import kept, storage
from ctrsink.errors import InputError
from ctrsink.report.data_section import data_section
from ctrsink.report.environment import environment_section, written
from ctrsink.report.figures import Rows, losses
from ctrsink.report.measured_sections import comparison_section, reliability_section, slices_section
from ctrsink.report.pace import draw_time, mean_rates, most_memory, time_spent
from ctrsink.report.page import SIZE, Figure, Listing, Note, Page, Part, Section, Table
from ctrsink.report.run_sections import configuration_section
from ctrsink.run.folder import claimed_data, flatten
from ctrsink.studies.compare import STUDY, compare
from ctrsink.studies.measured import Measured, read_measured, variants_of
from ctrsink.studies.report_run import is_measured, or_missing, result_of, state_of
from ctrsink.train.observe.telemetry import read_metrics


def runs_below(folder: str) -> list[str]:
    """Folders of the runs and baselines in a study's folder: `NAME` or `NAME/seed-N` below it, by name and seed."""
    found: list[str] = []
    for name in storage.list_dirs(folder):
        own = storage.join(folder, name)
        if is_measured(own):
            found.append(own)
            continue
        seeds = [seed for seed in storage.list_dirs(own) if re.fullmatch(r"seed-\d+", seed)]
        places = [storage.join(own, seed) for seed in sorted(seeds, key=lambda seed: int(seed.removeprefix("seed-")))]
        found += [place for place in places if is_measured(place)]
    return found


def study_page(folder: str, runs: list[str], split: str | None) -> Page:
    """The page of the runs in a study's folder; see `write_report`."""
    study = _study(folder)
    on: str = split or study.get("split") or "test"
    measured: list[Measured] = []
    missing: dict[str, str] = {}
    for run in runs:
        try:
            measured.append(read_measured(run, on))
        except InputError as error:
            missing[run] = str(error)
    order: dict[str, int] = {name: place for place, name in enumerate(study.get("variants") or ())}
    measured.sort(key=lambda run: order.get(run.name, len(order)))
    left_out = [Note(why, missing=True) for why in missing.values()]
    if not measured:
        comparison, slices, cards = Section("Comparison", left_out), Section("Slices", left_out[:1]), []
    else:
        baseline = next((run.folder for run in measured if run.name == study.get("baseline")), None)
        try:
            found = compare([run.folder for run in measured], on, baseline)
            comparison, slices = comparison_section(found), slices_section(found)
            comparison = Section(comparison.title, [*left_out, *comparison.parts], comparison.lead)
            cards = _cards(found)
        except InputError as error:  # they were measured on different impressions, or are not told apart
            comparison, cards = Section("Comparison", [*left_out, Note(str(error), missing=True)]), []
            slices = Section("Slices", [Note("There is no comparison.", missing=True)])
    trained = [run for run in measured if run.spec is not None]
    firsts = {name: own[0] for name, own in _variants(measured).items()}
    uris = list(dict.fromkeys(run.data for run in measured))
    data = [or_missing("Data", lambda uri=uri: data_section(uri, _claimed(trained, uri))) for uri in uris]
    return Page(
        title=folder.rpartition("/")[2],
        kind="study",
        place=folder,
        cards=cards,
        sections=[
            comparison,
            slices,
            _training(firsts),
            reliability_section(
                {name: (run.impressions.labels, run.probabilities) for name, run in firsts.items()},
                {} if firsts else missing,
            ),
            _pace(folder, runs, firsts),
            *[section if len(data) == 1 else Section(f"Data {number + 1}", section.parts, section.lead)
              for number, section in enumerate(data)],
            _configurations(trained, study),
            environment_section(),
        ],
        written=written(),
    )  # fmt: skip


def _study(folder: str) -> dict[str, Any]:
    """What `ctrsink study` left of its comparison; empty where it has not got so far, or the folder is of single runs."""
    path = storage.join(folder, f"{STUDY}.json")
    try:
        return kept.opened(json.loads(storage.read_bytes(path)), path)
    except FileNotFoundError:
        return {}
    except ValueError:
        again = "run `ctrsink study` again, which only compares where all runs are there"
        raise InputError(f"{path} is damaged: {again}") from None


def _variants(runs: list[Measured]) -> dict[str, list[Measured]]:
    try:
        return variants_of(runs)
    except InputError:  # told by the comparison; each stands for itself here
        return {run.folder: [run] for run in runs}


def _claimed(runs: list[Measured], uri: str) -> tuple[str, ...]:
    found = [claimed_data(run.folder) for run in runs if run.data == uri]
    return tuple(identity for identity in found if identity is not None)


def _cards(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    best = max(found["variants"], key=lambda name: found["variants"][name]["metrics"]["auc"]["mean"])
    between = found["variants"][best]["metrics"]["auc"]["by_users"]
    remark = best if between is None else f"{best}, {between[0]:.4f} to {between[1]:.4f}"
    counted = ("variants", str(len(found["variants"])), f"{sum(len(own['runs']) for own in found['variants'].values())} runs")
    impressions = (f"{found['split']} impressions", f"{found['impressions']:,}", f"of {found['users']:,} users")
    auc = found["variants"][best]["metrics"]["auc"]["mean"]
    return [counted, ("highest AUC", f"{auc:.4f}", remark), impressions, ("compared with", found["baseline"], "")]


def _training(firsts: dict[str, Measured]) -> Section:
    """Losses of the stages that learn clicks, which alone are comparable."""
    told: dict[str, Rows] = {}
    for name, run in firsts.items():
        if run.spec is not None:
            clicks = {stage.name for stage in run.spec.stages if stage.objective == "click"}
            told[name] = [row for row in read_metrics(run.folder) if row["stage"] in clicks]
    told = {name: rows for name, rows in told.items() if rows}
    if not told:
        return Section("Loss by stage", [Note("No run that was measured has rows in its metrics.jsonl.", missing=True)])
    figures: list[Part] = [
        Figure(f"{name}: log loss of the training batch.", partial(_loss, name=name, rows=rows)) for name, rows in told.items()
    ]
    return Section(
        "Loss by stage", figures, "Of the first seed of each variant, in the stages that learn clicks; a point is one batch."
    )


def _loss(figure: Any, name: str, rows: Rows) -> None:
    losses(figure.subplots(), {name: rows})


def _pace(folder: str, runs: list[str], firsts: dict[str, Measured]) -> Section:
    rows: list[tuple[str, ...]] = []
    for run in runs:
        result, own = result_of(run), read_metrics(run)
        rates, memory = mean_rates(own, result), most_memory(own)
        spent = time_spent(own, result)
        wait = f"{spent['waiting for data'] / sum(spent.values()):.1%}" if spent else "-"
        state = state_of(run, result)[0] if own else "no training"
        speed = [f"{rates[key]:,.0f}" if key in rates else "-" for key in ("impressions_per_s", "tokens_per_s")]
        seconds = result.get("seconds")
        most = f"{memory['memory_gib']:.2f}" if "memory_gib" in memory else "-"
        rows.append((run.removeprefix(f"{folder}/"), state, *speed, wait, "-" if seconds is None else f"{seconds:,.0f}", most))
    spent = {name: time_spent(read_metrics(run.folder), run.result) for name, run in firsts.items()}
    spent = {name: own for name, own in spent.items() if own}
    parts: list[Part] = []
    if spent:
        size = (SIZE[0], 1.7 + 0.34 * len(spent))
        parts.append(
            Figure("Where the time of training went, first seed of each.", partial(draw_time, runs=list(spent.items())), size)
        )
    parts.append(Table(("run", "state", "impressions/s", "tokens/s", "waiting for data", "seconds", "GiB"), rows, left=2))
    return Section("Throughput and time", parts, "GiB: of the process with most.")


def _configurations(runs: list[Measured], study: dict[str, Any]) -> Section:
    """The first run's configuration, and on which keys the variants differ."""
    if not runs:
        return Section("Configuration", [Note("No run was measured.", missing=True)])
    trees = {
        name: flatten(own[0].spec.model_dump(mode="json")) for name, own in _variants(runs).items() if own[0].spec is not None
    }
    keys = dict.fromkeys(key for tree in trees.values() for key in tree if key not in ("name", "run_dir", "seed"))
    rows = []
    for key in keys:
        values = [tree.get(key, "") for tree in trees.values()]
        if any(value != values[0] for value in values):
            rows.append((key, *map(str, values)))
    first = runs[0].spec
    assert first is not None
    parts: list[Part] = []
    if rows:
        parts.append(Table(("key", *trees), rows, caption="Keys on which the variants differ", left=len(trees) + 1))
    listing = configuration_section(first).parts[0]
    assert isinstance(listing, Listing)
    parts.append(Listing(f"Every key of {runs[0].name}, as resolved", listing.text))
    return Section("Configuration", parts)
