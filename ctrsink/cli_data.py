"""The verbs `ctrsink data` and `ctrsink model`: from a raw log to a data set, and a look at it."""

import argparse
from typing import TYPE_CHECKING, Any

from ctrsink.cli_arguments import add_verb, configured, count
from ctrsink.errors import InputError

if TYPE_CHECKING:
    from ctrsink.config import RunSpec
    from ctrsink.dataset.manifest import Manifest


def add_data_verbs(verbs: Any) -> None:
    """Add them to the parser's `verbs`."""
    data = verbs.add_parser("data", help="get and prepare data").add_subparsers(required=True, metavar="VERB")
    get = add_verb(data, "get", _data_get, "download a public data set")
    sizes = ("100k", "1m", "latest-small", "10m", "20m", "25m", "32m")
    get.add_argument("name", choices=[f"movielens-{size}" for size in sizes])
    get.add_argument("--to", required=True, metavar="DIR")
    prepare = add_verb(data, "prepare", _data_prepare, "turn the raw log of a configuration into tokenised shards", quiet=True)
    append = add_verb(data, "append", _data_append, "add a newer log to a data set, as shards of their own", quiet=True)
    for verb in (prepare, append):
        configured(verb)
        verb.add_argument("--to", metavar="URI", help="folder of the data set, local or s3:// (default: data.uri)")
        verb.add_argument("--on-bad-row", choices=["fail", "skip"], default="fail")
    prepare.add_argument("--overwrite", action="store_true", help="replace a data set that is there already")

    synth = add_verb(data, "synth", _data_synth, "write a made-up log whose best AUC is known")
    synth.add_argument("--to", required=True, metavar="DIR")
    synth.add_argument("--events", required=True, type=count, metavar="N")
    synth.add_argument("--users", type=count, metavar="U", help="default: one for 50 events")
    synth.add_argument("--items", type=count, metavar="I", help="default: one for 500 events, at least 1000")
    synth.add_argument("--seed", type=int, default=0, metavar="S")
    synth.add_argument("--format", choices=["csv", "parquet"], default="csv", help="of the event files")
    synth.add_argument(
        "--favourite-days", type=float, default=3.0, metavar="D", help="that a taste lasts, in the mean (default: 3)"
    )
    synth.add_argument("--hidden", action="store_true", help="titles and genres say nothing: what is alike shows in clicks alone")
    served = add_verb(
        data, "served", _data_served, "make an event log of what a service logged and of the clicks that came of it"
    )
    served.add_argument("--log", required=True, metavar="URI", help="folder that `ctrsink serve --log-requests` wrote")
    served.add_argument("--clicks", required=True, metavar="FILE", help="a table with the columns request and item")
    served.add_argument("--to", required=True, metavar="DIR")
    inspect = add_verb(data, "inspect", _data_inspect, "say what is in a prepared data set")
    inspect.add_argument("uri", metavar="URI")
    inspect.add_argument("--figures", metavar="DIR", help="draw figures into this folder, as PNG")
    signals = add_verb(data, "signals", _data_signals, "write the signals of every impression as Parquet, for another model")
    signals.add_argument("uri", metavar="URI", help="the prepared data set")
    signals.add_argument("--to", required=True, metavar="DIR")
    verify = add_verb(data, "verify", _data_verify, "check every file of a prepared data set and name the bad ones")
    verify.add_argument("uri", metavar="URI")

    model = verbs.add_parser("model", help="get a pretrained model").add_subparsers(required=True, metavar="VERB")
    get = add_verb(model, "get", _model_get, "download a small pretrained decoder")
    get.add_argument("name", choices=["smollm2-135m"])
    get.add_argument("--to", required=True, metavar="DIR")


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


def _data_served(args: argparse.Namespace) -> dict[str, Any]:
    from ctrsink.prepare.served import join_clicks

    return join_clicks(args.log, args.clicks, args.to)


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
