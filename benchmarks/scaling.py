"""How AUC grows with the FLOPs of training, over the variants of a finished study: AUC = E - A / X^alpha, fitted and drawn.

    ctrsink study --config configs/studies/scaling-sparse.yaml
    python -m benchmarks.scaling runs/studies/scaling-sparse --to docs/images

A form that SparseCTR (arXiv 2601.17836) is fitted with, too; X is the FLOPs that a run's `result.json` counts, in TFLOP.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import curve_fit

from benchmarks.report import markdown
from ctrsink.errors import InputError
from ctrsink.report.drawing import BLUE, ORANGE, draw_figures

TERA = 1e12


class Law(NamedTuple):
    """AUC = limit - scale / X^exponent, X in TFLOP, and how well it holds."""

    limit: float
    scale: float
    exponent: float
    r_squared: float

    def at(self, tflops: np.ndarray) -> np.ndarray:
        return self.limit - self.scale * tflops**-self.exponent


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("study", help="folder of a study, with its study.json")
    parser.add_argument("--to", default=None, help="folder of the figure, `scaling.png` (default: the study's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    try:
        report = told(json.loads((Path(args.study) / "study.json").read_text("utf-8")))
        draw_figures({"scaling": lambda figure: draw(figure, report)}, args.to or args.study)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if args.json else text(report))
    return 0


def told(study: dict[str, Any]) -> dict[str, Any]:
    """The variants that were trained, by their FLOPs, and the law through the AUC of all their runs."""
    points = sorted(
        (found["trained"]["flops"] / TERA, name, found["metrics"]["auc"]["runs"])
        for name, found in study["variants"].items()
        if (found.get("trained") or {}).get("flops")  # baselines are fitted without a count
    )
    rows = [{"variant": name, "tflops": tflops, "auc": runs} for tflops, name, runs in points]
    pairs = [(row["tflops"], auc) for row in rows for auc in row["auc"]]
    return {"split": study["split"], "points": rows, "law": fit(*zip(*pairs, strict=True))._asdict()}


def fit(tflops: Sequence[float], auc: Sequence[float]) -> Law:
    """Least squares of AUC; the limit lies in 0 to 1, scale and exponent above 0.

    Raises:
        InputError: fewer than four sizes, or no such curve is found.
    """
    x, y = np.array(tflops, float), np.array(auc, float)
    if len(set(tflops)) < 4:
        raise InputError(f"{len(set(tflops))} sizes: a curve of three unknowns needs at least four")
    start = (y.max(), max(np.ptp(y), 1e-3), 0.5)
    try:
        (limit, scale, exponent), _ = curve_fit(
            lambda x, limit, scale, exponent: limit - scale * x**-exponent, x, y, start, bounds=([0, 0, 1e-3], [1, np.inf, 5])
        )
    except RuntimeError as error:
        raise InputError(f"no curve fits: {error}") from None
    law = Law(float(limit), float(scale), float(exponent), 0.0)
    return law._replace(r_squared=float(1 - ((y - law.at(x)) ** 2).sum() / ((y - y.mean()) ** 2).sum()))


def draw(figure: Any, report: dict[str, Any]) -> None:
    """Every run as a point, and the law."""
    axes = figure.subplots()
    law = Law(**report["law"])
    for number, row in enumerate(report["points"]):
        axes.plot([row["tflops"]] * len(row["auc"]), row["auc"], "o", color=BLUE, label=None if number else "a run")
        axes.annotate(row["variant"], (row["tflops"], min(row["auc"])), xytext=(4, -12), textcoords="offset points", fontsize=8)
    ends = [row["tflops"] for row in report["points"]]
    line = np.geomspace(min(ends), max(ends), 200)
    axes.plot(line, law.at(line), color=ORANGE, linewidth=1.4, label=_law(law))
    axes.set(xscale="log", xlabel="TFLOP of training", ylabel=f"AUC, {report['split']}")
    axes.legend(frameon=False, loc="lower right")


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = [[row["variant"], f"{row['tflops']:.4g}", ", ".join(f"{auc:.4f}" for auc in row["auc"])] for row in report["points"]]
    return f"{markdown(('variant', 'TFLOP', 'AUC of each seed'), rows)}\n\n{_law(Law(**report['law']))}"


def _law(law: Law) -> str:
    return f"AUC = {law.limit:.4f} - {law.scale:.4f} / TFLOP^{law.exponent:.3f}, R² {law.r_squared:.3f}"


if __name__ == "__main__":
    sys.exit(main())
