"""The command line, `ctrsink <verb>`: thin; every verb calls one function and prints what it returned."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ctrsink import __version__, logs, strict_json
from ctrsink.errors import InputError, RunError, first_line

if TYPE_CHECKING:
    from ctrsink.config import RunSpec
    from ctrsink.dataset.manifest import Manifest

OK, FAILED, BAD_INPUT, INTERRUPTED, STOPPED = 0, 1, 2, 130, 143
Verb = Callable[[argparse.Namespace], dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 good, 1 failure, 2 bad input, 130 interrupted, 143 saved and stopped."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes overrides on one side of an option only.
    if rest and not (hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    logs.configure()
    try:
        result = args.run(args)
    except InputError as error:
        return _fail(args, error, BAD_INPUT)
    except RunError as error:
        return _fail(args, error, FAILED)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        return _fail(args, f"{type(error).__name__}: {first_line(error)}", FAILED)
    if args.json:
        print(strict_json.dumps(result))
    elif result:
        print("\n".join(f"{key}: {_text(value)}" for key, value in result.items()))
    # Whoever watches the process must see that the run is not done: Kubernetes would take 0 for its end.
    return STOPPED if result.get("stopped") else OK


def _fail(args: argparse.Namespace, error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    if args.json:
        print(strict_json.dumps({"error": str(error), "exit_code": code}))
    return code


def _text(value: Any, depth: int = 1) -> str:
    if isinstance(value, dict):
        return "".join(f"\n{'  ' * depth}{key}: {_text(inner, depth + 1)}" for key, inner in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


# The verbs import what they need when they run: scoring must not wait for Ray, nor need it. Torch takes a second and more to
# import: what can be refused without it is refused before.


def _data_get(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.prepare.download import download

    return {"data": str(download(args.name, args.to))}


def _data_prepare(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.prepare import prepare_run

    spec = _with_log(args)
    return _prepared(args.to or spec.data.uri, prepare_run(spec, args.to, args.on_bad_row, args.overwrite))


def _data_append(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.prepare import append_run

    spec = _with_log(args)
    return _prepared(args.to or spec.data.uri, append_run(spec, args.to, args.on_bad_row))


def _with_log(args: argparse.Namespace) -> "RunSpec":
    from ctrsink.config import load_run

    spec = load_run(args.config, args.overrides)
    if spec.prepare is None:
        raise InputError(f"{args.config} has no section prepare: say there what the raw log is")
    return spec


def _prepared(to: str, manifest: "Manifest") -> dict[str, Any]:
    """What the last preparation brought and, where it was appended, what the whole data set holds then."""
    part = manifest.parts[-1]
    whole: dict[str, Any] = {"items": manifest.item_count}
    if len(manifest.parts) > 1:
        counts = {"events": manifest.events, "chronologies": manifest.users, "shards": len(manifest.shards)}
        whole = {"data_set": {"parts": len(manifest.parts), **whole, **counts}}
    splits = {name: f"{counts.impressions} impressions, {counts.positives} positive" for name, counts in part.splits.items()}
    return {
        "data": to,
        "part": len(manifest.parts) - 1,
        "users": part.users,
        "events": part.events,
        "skipped_rows": part.skipped_rows,
        "duplicates": {"dropped" if part.duplicates_dropped else "kept": part.duplicates},
        "shards": sum(shard.part == len(manifest.parts) - 1 for shard in manifest.shards),
        "splits": splits,
        **whole,
    }


def _data_synth(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.prepare.synth import synth

    more = {"favourite_days": args.favourite_days, "hidden": args.hidden}
    truth = synth(args.to, args.events, args.users, args.items, args.seed, args.format, **more)
    return (
        {"log": args.to}
        | {key: truth[key] for key in ("events", "users", "items")}
        | {"test_auc": truth["splits"]["test"]["auc"]}
    )


def _data_inspect(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.dataset.inspect import as_table, inspect, summarise

    found = inspect(args.uri)
    summary = summarise(found)
    figures: dict[str, Any] = {}
    if args.figures:
        from ctrsink.report.data_figures import draw_data

        figures = {"figures": draw_data(found, args.figures)}
    if args.json:
        return summary | figures
    print(as_table(summary))
    return figures


def _data_signals(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.dataset.signal_tables import write_signals

    return {"signals": args.to} | write_signals(args.uri, args.to)


def _data_verify(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.dataset.verify import verify

    return verify(args.uri, print)


def _model_get(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.prepare.pretrained import get_pretrained

    return {"model": str(get_pretrained(args.name, args.to))}


def _config_show(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import dump_run, load_run

    spec = load_run(args.config, args.overrides)
    if args.json:
        return spec.model_dump(mode="json")
    print(dump_run(spec), end="")
    return {}


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.config import load_run
    from ctrsink.runtime.start import start

    spec = load_run(args.config, args.overrides)
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

    return export_run(args.run_dir, args.to, args.dtype, args.checkpoint)


def _score(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.request_lines import read_lines, require_model

    lines = read_lines(args.input, args.on_bad_request)
    require_model(args.model)
    from ctrsink.serve.scorer import score_lines

    counts = score_lines(args.model, lines, args.output, args.on_bad_request)
    if args.output is not None or args.json:
        return counts
    print(", ".join(f"{key}: {value}" for key, value in counts.items()), file=sys.stderr)  # stdout is the scores'
    return {}


def _submit(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.runtime.submit import submit

    return submit(args.config, args.overrides, args.address, args.working_dir, args.resume)


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
    print(as_table(found))
    return {key: found[key] for key in ("folder", "files")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ctrsink", description="Fine-tune decoder language models for CTR prediction with sink tokens."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    data = verbs.add_parser("data", help="get and prepare data").add_subparsers(required=True, metavar="VERB")
    get = _verb(data, "get", _data_get, "download a public data set")
    sizes = ("100k", "1m", "latest-small", "10m", "20m", "25m", "32m")
    get.add_argument("name", choices=[f"movielens-{size}" for size in sizes])
    get.add_argument("--to", required=True, metavar="DIR")
    prepare = _verb(data, "prepare", _data_prepare, "turn the raw log of a configuration into tokenised shards")
    append = _verb(data, "append", _data_append, "add a newer log to a data set, as shards of their own")
    for verb in (prepare, append):
        _configured(verb)
        verb.add_argument("--to", metavar="URI", help="folder of the data set, local or s3:// (default: data.uri)")
        verb.add_argument("--on-bad-row", choices=["fail", "skip"], default="fail")
    prepare.add_argument("--overwrite", action="store_true", help="replace a data set that is there already")

    synth = _verb(data, "synth", _data_synth, "write a made-up log whose best AUC is known")
    synth.add_argument("--to", required=True, metavar="DIR")
    synth.add_argument("--events", required=True, type=_count, metavar="N")
    synth.add_argument("--users", type=_count, metavar="U", help="default: one for 50 events")
    synth.add_argument("--items", type=_count, metavar="I", help="default: one for 500 events, at least 1000")
    synth.add_argument("--seed", type=int, default=0, metavar="S")
    synth.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the event files")
    synth.add_argument(
        "--favourite-days", type=float, default=3.0, metavar="D", help="that a taste lasts, in the mean (default: 3)"
    )
    synth.add_argument("--hidden", action="store_true", help="titles and genres say nothing: what is alike shows in clicks alone")
    inspect = _verb(data, "inspect", _data_inspect, "say what is in a prepared data set")
    inspect.add_argument("uri", metavar="URI")
    inspect.add_argument("--figures", metavar="DIR", help="draw figures into this folder, as PNG")
    signals = _verb(data, "signals", _data_signals, "write the signals of every impression as Parquet, for another model")
    signals.add_argument("uri", metavar="URI", help="the prepared data set")
    signals.add_argument("--to", required=True, metavar="DIR")
    verify = _verb(data, "verify", _data_verify, "check every file of a prepared data set and name the bad ones")
    verify.add_argument("uri", metavar="URI")

    model = verbs.add_parser("model", help="get a pretrained model").add_subparsers(required=True, metavar="VERB")
    get = _verb(model, "get", _model_get, "download a small pretrained decoder")
    get.add_argument("name", choices=["smollm2-135m"])
    get.add_argument("--to", required=True, metavar="DIR")

    config = verbs.add_parser("config", help="look at a configuration").add_subparsers(required=True, metavar="VERB")
    show = _verb(config, "show", _config_show, "print the resolved configuration")
    show.add_argument("config", metavar="FILE")
    show.add_argument("overrides", nargs="*", metavar="section.key=value")

    train = _verb(verbs, "train", _train, "train and evaluate the run of a configuration")
    _configured(train)
    train.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in run_dir, if there is one")
    train.add_argument("--stop-after", type=_count, metavar="N", help="stop after N optimiser steps, with a checkpoint")

    stop = _verb(verbs, "stop", _stop, "ask a run that trains somewhere to save itself and stop; --resume goes on with it")
    stop.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")

    evaluate = _verb(verbs, "evaluate", _evaluate, "measure a run's model on splits of its data set")
    evaluate.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    evaluate.add_argument("--split", nargs="+", choices=["train", "valid", "test"], default=["valid", "test"])
    evaluate.add_argument("--checkpoint", type=_step, metavar="STEP", help="or best, by train.keep.best; default: the latest")

    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="as in training, at a place: runtime.kind=ray; before --split"
    )

    looked = _verb(verbs, "look", _look, "say where a run's model looks, and what each signal is worth to it")
    looked.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    looked.add_argument("--split", choices=["train", "valid", "test"], default="valid")
    looked.add_argument("--sequences", type=_count, default=64, metavar="N", help="size of the sample (default: 64)")

    export = _verb(verbs, "export", _export, "write the merged model of a run as a folder that scores by itself")
    export.add_argument("--run", dest="run_dir", required=True, metavar="RUN_DIR")
    export.add_argument("--to", required=True, metavar="URI")
    export.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    export.add_argument("--checkpoint", type=_step, metavar="STEP", help="or best, by train.keep.best; default: the latest")

    score = _verb(verbs, "score", _score, "click probabilities for requests, one JSON object a line")
    score.add_argument("--model", required=True, metavar="DIR")
    score.add_argument("--input", required=True, metavar="FILE")
    score.add_argument("--output", metavar="FILE", help="default: stdout")
    score.add_argument(
        "--on-bad-request", choices=["fail", "skip"], default="fail", help="skip: its line of the output says what is wrong"
    )

    submit = _verb(verbs, "submit", _submit, "run `train` as a job on a Ray cluster and follow it")
    _configured(submit)
    submit.add_argument(
        "--address", default=os.environ.get("RAY_API_SERVER_ADDRESS"), help="of the cluster's job server, http://..."
    )
    submit.add_argument(
        "--working-dir", default=".", metavar="DIR", help="folder that is sent to the cluster; holds the configuration"
    )
    submit.add_argument("--resume", action="store_true")

    study = _verb(verbs, "study", _study, "train variants with several seeds and compare them; goes on where it was")
    study.add_argument("--config", required=True, metavar="FILE", help="of the study")
    study.add_argument("--to", metavar="DIR", help="folder of the study, local or s3:// (default: its key folder)")

    compare = _verb(verbs, "compare", _compare, "compare runs on the same impressions, with intervals, and by slices")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; those that differ in the seed are one variant")
    compare.add_argument("--split", choices=["train", "valid", "test"], default="test")
    compare.add_argument("--baseline", metavar="RUN", help="whose variant the others are compared with; default: the first")
    compare.add_argument("--to", metavar="DIR", help="write the comparison and its figures into this folder, local or s3://")
    return parser


def _verb(verbs: Any, name: str, run: Verb, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def _step(text: str) -> int | str:
    return text if text == "best" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
