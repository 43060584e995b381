"""Whether a change of the code changed a number: the same runs on two commits, their losses compared bit for bit.

A move of code is proved by it. Each commit is checked out into a folder of its own and runs its own code on its own data set,
prepared from one synthetic log; every step's loss and gradient norm, and the metrics of the evaluation, must be the same numbers.
Where a change sums the same terms in another order, `--within` says how far they may be apart.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import machine, machine_line, markdown
from ctrsink import logs, strict_json
from ctrsink.errors import InputError

# Forms, backends that train on a CPU, and what changes the layout of a sequence or the rule of attention.
FORMS = {
    "per_target": ("data.examples=per_target", "train.batch_size=16", "train.micro_batch_size=8"),
    "per_request": ("data.examples=per_request", "data.targets=8", "train.micro_batch_tokens=4096"),
    "per_user": ("data.examples=per_user", "data.targets=12"),
}
BACKENDS = ("sdpa", "blocks")
MODELS = {
    "default": (),
    "paper": ("model.sinks.signals=[previous_gap,random]", "model.similarity=null", "model.bias={}", "data.text_history=null"),
    "no sinks": ("model.sinks=null", "model.similarity=null", "data.text_history=null", "stages.0.trainable=[head, backbone]"),
    "window": ("model.window=6", "model.temporal=true"),
}
COMMON = (
    "runtime={kind: local, workers: 1}", "train.zero_stage=0", "train.batch_size=4", "train.micro_batch_size=2",
    "train.log_every=1", "train.checkpoint_every=1000", "data.history=30", "data.text_history=4",
    "evaluate={splits: [test], max_sequences: 40}",
    "model.target.dropout=0",  # its random numbers are drawn in the order of the arrays, which a move may change
)  # fmt: skip


def main() -> int:
    """Run the comparison; returns the exit code: 1 where a number differs."""
    parser = argparse.ArgumentParser("python -m benchmarks.loss_compare", description=__doc__)
    parser.add_argument("old", metavar="COMMIT")
    parser.add_argument("new", metavar="COMMIT")
    parser.add_argument("--events", type=int, default=6000, help="of the log (default: 6000)")
    parser.add_argument("--steps", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--only", metavar="WORD", default="", help="only runs whose name has this word in it")
    parser.add_argument("--within", type=float, default=0.0, help="largest difference, as a share of the number (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    logs.configure()
    try:
        report = run(args.old, args.new, args.events, args.steps, args.only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0 if all(row["largest"] <= args.within for row in report["runs"]) else 1


def cases(only: str = "") -> dict[str, tuple[str, ...]]:
    """By name the overrides of each run."""
    every = itertools.product(FORMS.items(), BACKENDS, MODELS.items())
    named = {
        f"{form}, {backend}, {model}": (*of_form, f"model.attention={backend}", *of_model)
        for (form, of_form), backend, (model, of_model) in every
    }
    return {name: overrides for name, overrides in named.items() if only in name}


def run(old: str, new: str, events: int, steps: int, only: str) -> dict[str, Any]:
    """Run all cases on both commits.

    Raises:
        InputError: there is no such commit, or a run fails; the message has the end of what it said.
    """
    names = cases(only)
    if not names:
        raise InputError(f"no run has {only!r} in its name; they are: {'; '.join(cases())}")
    found: list[dict[str, list[str]]] = []
    commits = []
    with tempfile.TemporaryDirectory() as folder:
        for number, commit in enumerate((old, new)):
            with _checked_out(commit, Path(folder) / f"code-{number}") as code:
                commits.append(_said("git", "rev-parse", "--short", "HEAD", cwd=code).strip())
                work = Path(folder) / f"work-{number}"
                _prepared(code, work, events)
                found.append({name: _numbers(code, work, f"run-{n}", steps, names[name]) for n, name in enumerate(names)})
    runs = [
        {"run": name, "numbers": len(found[0][name]), "same": sum(a == b for a, b in _pairs(found, name))}
        | {"largest": max(_apart(a, b) for a, b in _pairs(found, name))}
        | {"first": next((f"{a} / {b}" for a, b in _pairs(found, name) if a != b), None)}
        for name in names
    ]
    return {"machine": machine(), "commits": commits, "events": events, "steps": steps, "runs": runs}


def text(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [(row["run"], row["numbers"], row["same"], f"{row['largest']:.1e}", row["first"] or "-") for row in report["runs"]]
    old, new = report["commits"]
    head = f"{report['steps']} steps each, {old} and {new}; {machine_line(report['machine'])}"
    return f"{head}\n\n{markdown(('run', 'numbers', 'the same', 'largest difference', 'the first that differs'), rows)}"


def _pairs(found: list[dict[str, list[str]]], name: str) -> list[tuple[str, str]]:
    return list(zip(found[0][name], found[1][name], strict=True))


def _apart(one: str, other: str) -> float:
    """How far two numbers are apart, as a share of the first; infinite where they are not of the same thing."""
    (what, a), (also, b) = (text.rsplit(" ", 1) for text in (one, other))
    return abs(float(a) - float(b)) / max(abs(float(a)), 1e-12) if what == also else math.inf


@contextmanager
def _checked_out(commit: str, to: Path) -> Iterator[Path]:
    _said("git", "worktree", "add", "--detach", str(to), commit)
    try:
        yield to
    finally:
        _said("git", "worktree", "remove", "--force", str(to))


def _prepared(code: Path, work: Path, events: int) -> None:
    _ctrsink(code, "data", "synth", "--to", str(work / "raw"), "--events", str(events), "--items", "200")
    _ctrsink(code, "data", "prepare", "--config", "configs/synthetic.yaml", *_places(work))


def _numbers(code: Path, work: Path, name: str, steps: int, overrides: tuple[str, ...]) -> list[str]:
    """Every number of a run that its code decides on, as text in full precision."""
    to = work / name
    lengths = (f"stages.0.steps={steps}", "stages.0.epochs=null", "stages.0.until=any", f"run_dir={to}")
    _ctrsink(code, "train", "--config", "configs/synthetic.yaml", *_places(work), *COMMON, *overrides, *lengths)
    lines = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    said = [f"step {line['step']} {key} {line[key]!r}" for line in lines for key in ("loss", "grad_norm") if key in line]
    measured = json.loads((to / "result.json").read_text())["evaluation"]["test"]
    return [*said, *(f"{key} {measured[key]!r}" for key in ("impressions", "auc", "gauc", "logloss"))]


def _places(work: Path) -> tuple[str, ...]:
    source = f"prepare.source.path={work}/raw/events", f"prepare.source.items={work}/raw/items.csv"
    return (*source, f"data.uri={work}/data")


def _ctrsink(code: Path, *arguments: str) -> None:
    _said(sys.executable, "-m", "ctrsink", *arguments, cwd=code)


def _said(*command: str, cwd: Path | None = None) -> str:
    paths = {} if cwd is None else {"PYTHONPATH": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | paths, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
