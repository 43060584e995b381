"""A log with columns of its own, prepared with all that signals need, and runs that are told every signal."""

import csv
from pathlib import Path
from typing import Any

from ctrsink.config.data import FieldSpec, NeighboursSpec, PrepareSpec, SourceSpec, StatisticsSpec
from ctrsink.config.train import EvaluateSpec
from ctrsink.evaluate.evaluator import predict
from ctrsink.evaluate.predictions import Predictions
from ctrsink.features.registry import SIGNALS
from ctrsink.prepare.build import prepare
from ctrsink.train.restore import restore_run
from tests.data_fixtures import make_events, prepare_spec, table_source, write_table
from tests.serving_fixtures import Prepared, run_spec

OF_SINKS = tuple(name for name, signal in SIGNALS.items() if "behaviour" in signal.sides)


OF_TARGETS = tuple(name for name, signal in SIGNALS.items() if "target" in signal.sides)


COLUMNS = ("log.price", "hashed.log.slot", "log.rank", "item.year", "hashed.item.year", "mean.item.genres", "count.item.genres")


def columned(source: SourceSpec) -> SourceSpec:
    """The log with columns of its own: a number, a category, both blank here and there, and the logit of another ranker."""
    path = Path(source.path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        time = int(row["when"])
        row["price"] = "" if time % 5 == 0 else f"{time % 97 / 8}"
        row["slot"] = ("top", " side", "", "É1")[time % 4]
        row["rank"] = "" if time % 6 == 0 else f"{time % 13 / 4 - 1.5}"
    write_table(path, rows)  # pyright: ignore[reportArgumentType]
    return source


def told_data(folder: Path, requests: bool) -> Prepared:
    source = columned(table_source(folder / "raw", make_events(9, 12)))
    if not requests:
        source = source.model_copy(update={"columns": source.columns.model_copy(update={"request": None})})
    column = "genres"
    spec = prepare_spec(source).model_copy(
        update={
            "statistics": StatisticsSpec(period="hour", fields=(FieldSpec(column=column, separator=" "),), user_events=5),
            "neighbours": NeighboursSpec(partners=3, shrink=2.0),
            "columns": COLUMNS,
        }
    )
    prepare(PrepareSpec.model_validate(spec.model_dump()), str(folder / "data"))
    return Prepared(str(folder / "data"), spec)


def sourced(folder: Path, events: list[Any]) -> SourceSpec:
    source = columned(table_source(folder / "raw", events))
    return source.model_copy(update={"columns": source.columns.model_copy(update={"request": None})})


def spec_of(data: Prepared, run_dir: str, examples: str, **sequences: Any) -> Any:
    of_sinks = [name for name in OF_SINKS if examples != "per_user" or not SIGNALS[name].depends_on_target]
    of_sinks = [name for name in of_sinks if name != "similarity"]
    model = {
        "sinks": {"signals": [*of_sinks, *COLUMNS], "buckets": 30, "rows": 9, "embedding_size": 8},
        "target": {"signals": [*OF_TARGETS, *COLUMNS], "rows": 40},
        "base": "log.rank",
        "similarity": "neighbours",
        "temporal": True,
    }
    groups = ("sink", "bias", "head", "ids", "lora")
    return run_spec(data, run_dir, trainable=groups, model=model, examples=examples, **sequences)


def evaluated(run_dir: str, split: str) -> Predictions:
    run = restore_run(run_dir)
    return predict(lambda batch: run.model(batch, run.objective), run.dataset, split, run.layout, EvaluateSpec())
