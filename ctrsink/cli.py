"""The command line, `ctrsink <verb>`: thin; every verb calls one function and prints what it returned."""

import argparse
import logging
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ctrsink import __version__, logs, strict_json, terminal
from ctrsink.cli_arguments import add_place, add_verb, add_verbose, configured, count, count_or_none, step
from ctrsink.cli_data import add_data_verbs
from ctrsink.cli_jobs import add_job_verbs
from ctrsink.cli_score import add_score_verb
from ctrsink.cli_serve import add_serve_verb
from ctrsink.errors import InputError, RunError, first_line

log = logging.getLogger("ctrsink")
OK, FAILED, BAD_INPUT, INTERRUPTED, STOPPED = 0, 1, 2, 130, 143
_until_the_end: list[ExitStack] = []  # what nobody holds is closed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 good, 1 failure, 2 bad input, 130 interrupted, 143 saved and stopped."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides on one side of an option only.
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    with ExitStack() as until:
        if args.quiet and not getattr(args, "verbose", False):
            until.enter_context(terminal.quiet(logs.relay))
        logs.configure()
        try:
            return _run(args)
        finally:
            logs.clear()
            if argv is None:  # the process ends now: what libraries say meanwhile goes where the rest went
                _until_the_end.append(until.pop_all())
                terminal.finish()


def _run(args: argparse.Namespace) -> int:
    """Run the verb and print what it returned, or why it failed; returns the exit code."""
    try:
        result = args.run(args)
    except InputError as error:
        return _fail(args, error, BAD_INPUT)
    except RunError as error:
        _tell_where()
        return _fail(args, error, FAILED)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", INTERRUPTED)
    except Exception as error:
        _tell_where()
        traceback.print_exc(file=terminal.err())
        return _fail(args, f"{type(error).__name__}: {first_line(error)}", FAILED)
    logs.clear()
    if args.json:
        print(strict_json.dumps(result), file=terminal.out())
    elif result:
        print("\n".join(f"{key}: {_text(value)}" for key, value in result.items()), file=terminal.out())
    # Whoever watches the process must see that the run is not done: Kubernetes would take 0 for its end.
    return STOPPED if result.get("stopped") else OK


def _tell_where() -> None:
    """Keep what libraries said, where it is not kept anyway, and say where it is."""
    if (path := terminal.keep()) is not None:
        log.info("what libraries said is in %s", path)


def _fail(args: argparse.Namespace, error: object, code: int) -> int:
    logs.clear()
    print(f"error: {error}", file=terminal.err())
    if args.json:
        print(strict_json.dumps({"error": str(error), "exit_code": code}), file=terminal.out())
    return code


def _text(value: Any, depth: int = 1) -> str:
    if isinstance(value, dict):
        return "".join(f"\n{'  ' * depth}{key}: {_text(inner, depth + 1)}" for key, inner in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


# The verbs import what they need when they run: scoring must not wait for Ray, nor need it. Torch takes a second and more to
# import: what can be refused without it is refused before.


def _config_show(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import dump_run, load_run

    spec = load_run(args.config, args.overrides)
    if args.json:
        return spec.model_dump(mode="json")
    print(dump_run(spec), end="")
    return {}


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import load_run
    from ctrsink.runtime.plan import plan_run

    more = {"utilisation": args.utilisation, "network_gbit": args.network, "price": args.price, "sweep": args.sweep}
    found = plan_run(load_run(args.config, args.overrides), args.gpu, args.nodes, args.gpus_per_node, **more)
    if args.json:
        return found
    from ctrsink.estimate.table import as_table

    print(as_table(found))
    return {}


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import load_run
    from ctrsink.runtime.start import start

    spec = load_run(args.config, args.overrides)
    if args.dry_run:
        if args.resume or args.stop_after:
            raise InputError("--dry-run writes nothing and begins anew: leave out --resume and --stop-after")
        from ctrsink.runtime.dry_run import dry_run_here

        found = dry_run_here(spec)
        return found if args.json else {row.pop("stage"): row for row in found["stages"]}
    return {"run_dir": spec.run_dir} | start(spec, args.resume, args.stop_after)


def _stop(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.run.presence import stop_run

    holder = stop_run(args.run_dir, "ctrsink stop")
    return {"run_dir": args.run_dir, "requested": f"of {holder}: save and stop; it takes a step and a few seconds"}


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.evaluate import evaluate

    return {
        "run_dir": args.run_dir,
        "evaluation": evaluate(args.run_dir, args.overrides, tuple(args.split), args.checkpoint),
    }


def _look(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.report.look import look

    return look(args.run_dir, args.split, args.sequences)


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.run.folder import read_run

    read_run(args.run_dir)
    from ctrsink.export.package import export_run

    return export_run(args.run_dir, args.to, args.dtype, args.checkpoint, args.form)


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.report.comparison import as_table
    from ctrsink.studies.compare import compare, write_comparison

    found = compare(args.runs, args.split, args.baseline)
    files = {"files": write_comparison(found, args.to)} if args.to else {}
    if args.json:
        return found | files
    print(as_table(found))
    return files


def _study(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.report.comparison import as_table
    from ctrsink.studies.study import run_study

    found = run_study(args.config, args.to)
    if args.json or "stopped" in found:
        return found
    print(as_table(found), file=terminal.out())
    return {key: found[key] for key in ("folder", "files")}


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.studies.report import write_report

    return write_report(args.folder, args.to, args.split, args.sequences)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ctrsink", description="Fine-tune decoder language models for CTR prediction with sink tokens."
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_verbose(parser)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    add_data_verbs(verbs)

    config = verbs.add_parser("config", help="look at a configuration").add_subparsers(required=True, metavar="VERB")
    show = add_verb(config, "show", _config_show, "print the resolved configuration")
    show.add_argument("config", metavar="FILE")
    show.add_argument("overrides", nargs="*", metavar="section.key=value")

    plan = add_verb(verbs, "plan", _plan, "say what a run would take: memory, time, traffic, cost, and what limits it")
    configured(plan)
    add_place(plan)

    train = add_verb(verbs, "train", _train, "train and evaluate the run of a configuration", quiet=True)
    configured(train)
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in run_dir, if there is one")
    train.add_argument("--stop-after", type=count, metavar="N", help="stop after N optimiser steps, with a checkpoint")
    train.add_argument(
        "--dry-run", action="store_true", help="make one step of each stage as the first of runtime.workers, and write nothing"
    )

    stop = add_verb(verbs, "stop", _stop, "ask a run that trains somewhere to save itself and stop; --resume goes on with it")
    stop.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")

    evaluate = add_verb(verbs, "evaluate", _evaluate, "measure a run's model on splits of its data set", quiet=True)
    evaluate.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    evaluate.add_argument("--split", nargs="+", choices=["train", "valid", "test"], default=["valid", "test"])
    evaluate.add_argument("--checkpoint", type=step, metavar="STEP", help="or best, by train.keep.best; default: the latest")

    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in training, at a place: runtime.kind=ray; before --split"
    )

    looked = add_verb(verbs, "look", _look, "say where a run's model looks, and what each signal is worth to it", quiet=True)
    looked.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    looked.add_argument("--split", choices=["train", "valid", "test"], default="valid")
    looked.add_argument("--sequences", type=count, default=64, metavar="N", help="size of the sample (default: 64)")

    page = "write one page of a run or a study: a file that shows all and loads nothing"
    report = add_verb(verbs, "report", _report, page, quiet=True)
    report.add_argument("folder", metavar="RUN|STUDY", help="folder of a run, or of a study")
    report.add_argument("--to", required=True, metavar="FILE", help="of the page, HTML; local or s3://")
    report.add_argument("--split", choices=["train", "valid", "test"], help="default: a study's own, else test")
    report.add_argument(
        "--sequences",
        type=count_or_none,
        default=64,
        metavar="N",
        help="sample of the look into a run (default: 64); 0: no look",
    )

    export = add_verb(verbs, "export", _export, "write the model of a run as a folder that scores by itself", quiet=True)
    export.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    export.add_argument("--to", required=True, metavar="URI")
    export.add_argument(
        "--form",
        choices=["merged", "adapter", "plain"],
        default="merged",
        help="merged: the folder stands alone; adapter: LoRA in PEFT's files, for the base it was trained on; plain: a model "
        "without sinks as one that transformers alone scores with",
    )
    export.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    export.add_argument("--checkpoint", type=step, metavar="STEP", help="or best, by train.keep.best; default: the latest")

    add_score_verb(verbs)

    add_serve_verb(verbs)
    add_job_verbs(verbs)

    study = add_verb(
        verbs, "study", _study, "train variants with several seeds and compare them; goes on where it was", quiet=True
    )
    study.add_argument("--config", required=True, metavar="FILE", help="of the study")
    study.add_argument("--to", metavar="DIR", help="folder of the study, local or s3:// (default: its key folder)")

    compare = add_verb(verbs, "compare", _compare, "compare runs on the same impressions, with intervals, and by slices")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; those that differ in the seed are one variant")
    compare.add_argument("--split", choices=["train", "valid", "test"], default="test")
    compare.add_argument("--baseline", metavar="RUN", help="whose variant the others are compared with; default: the first")
    compare.add_argument("--to", metavar="DIR", help="write the comparison and its figures into this folder, local or s3://")
    return parser
