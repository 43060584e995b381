"""What the measurements of data_stream.py come to: medians and ratios, and their tables."""

import statistics
from typing import Any

from benchmarks.contestants import OURS
from benchmarks.report import GIB, machine_line, markdown
from benchmarks.stream_jobs import Who

Results = dict[Who, list[dict[str, Any]]]


def speed_figures(results: Results) -> dict[str, Any]:
    """A row per contestant and number of workers; and the ratio of the fastest of ours to the fastest of the others."""
    rates = {who: [result["impressions_per_s"] for result in found] for who, found in results.items()}
    middle = {who: statistics.median(found) for who, found in rates.items()}
    rows = [
        {
            "contestant": name,
            "workers": workers,
            "impressions_per_s": rate,
            "slowest": min(rates[name, workers]),
            "fastest": max(rates[name, workers]),
            "ours_over_this": middle[OURS, workers] / rate if (OURS, workers) in middle else None,
        }
        for (name, workers), rate in middle.items()
    ]
    fastest = {
        who: max((row for row in rows if (row["contestant"] == OURS) == (who == "ours")), key=_rate, default=None)
        for who in ("ours", "other")
    }
    ours, other = fastest["ours"], fastest["other"]
    return {"speed": rows, "fastest": fastest, "ratio": _rate(ours) / _rate(other) if ours and other else None}


def _rate(row: dict[str, Any]) -> float:
    return row["impressions_per_s"]


def first_figures(results: Results) -> dict[str, Any]:
    """Seconds to the first batch of each contestant."""
    rows = []
    for (name, _), found in results.items():
        start, resume = (statistics.median(result[which] for result in found) for which in ("start_s", "resume_s"))
        rows.append({"contestant": name, "start_s": start, "resume_s": resume, "resume_over_start": resume / start})
    return {"first_batch": rows}


def memory_figures(found: dict[str, int]) -> dict[str, Any]:
    """Resident bytes by number of batches, and how much the last is above the first."""
    sizes = list(found.values())
    return {"memory": {"bytes_after_batches": found, "growth": sizes[-1] / sizes[0] - 1}}


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = report["settings"]
    parts = [
        f"Machine: {machine_line(report['machine'])}",
        f"Data: {settings['impressions']:,} impressions to train on, {settings['place']}; batches of {settings['batch_size']}, "
        f"up to {settings['history']} behaviours, sinks {settings['sinks']}; median of {settings['repeats']} processes. "
        f"Shuffled: {', '.join(f'{name} {how}' for name, how in settings['shuffled'].items())}. "
        f"Every tensor of {sum(report['checked_impressions'].values()):,} impressions was compared with ours: all equal.",
        "## Impressions per second, batches ready for the model",
        markdown(
            ["contestant", "workers", "impressions/s", "slowest", "fastest", "ours with as many / this"],
            [list(row.values()) for row in report["speed"]],
        ),
    ]
    if report["ratio"]:
        ours, other = report["fastest"]["ours"], report["fastest"]["other"]
        parts.append(
            f"fastest of ours ({ours['workers']} workers) / fastest of the others "
            f"({other['contestant']}, {other['workers']} workers): {report['ratio']:.2f}"
        )
    parts += [f"not measured: {name}; install it with: {how}" for name, how in report["not_installed"].items()]
    header = ["contestant", "at the start", f"at {settings['resume_at']:.0%} of an epoch", "ratio"]
    parts += ["## Seconds to the first batch", markdown(header, [list(row.values()) for row in report["first_batch"]])]
    sizes = report["bytes"]
    rows = [[name, size / GIB, size / settings["impressions"], size / sizes[OURS]] for name, size in sizes.items()]
    parts += ["## Bytes on disk", markdown(["form", "GiB", "bytes / impression", "this / ours"], rows)]
    if "memory" in report:
        rows = [[int(batches), size / GIB] for batches, size in report["memory"]["bytes_after_batches"].items()]
        parts += ["## Resident memory of ours", markdown(["batches", "GiB"], rows), f"growth: {report['memory']['growth']:.1%}"]
    return "\n\n".join(parts)
