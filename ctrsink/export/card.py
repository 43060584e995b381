"""The model card: what the model is, what it was trained on, for how long, how good it is and how to use it."""

import json

from ctrsink import kept, storage
from ctrsink.config import RunSpec, StageSpec
from ctrsink.dataset.layout import Layout
from ctrsink.evaluate.metrics import no_better_than_the_mean
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.families.registry import family_of, source_of
from ctrsink.features.columns import columns_of
from ctrsink.prepare.download import LICENCE
from ctrsink.stream.order import Order
from ctrsink.train.restore import TrainedRun

CARD_NAME = "README.md"


def model_card(run: TrainedRun, facts: list[str], use: str | None = None) -> str:
    """Markdown with a YAML head; no path and no host of the machine that trained it appears in it.

    Args:
        facts: sentences on the files beside it.
        use: how they are used, where that is not by this library.
    """
    sections = [
        "---\nlibrary_name: ctrsink\ntags: [click-through-rate, recommendation]\n---",
        f"# {run.spec.name}\n\n{_summary(run, facts)}",
        f"## Data\n\n{_data(run)}",
        f"## Training\n\n{_training(run)}",
        f"## Metrics\n\n{_metrics(run)}",
        f"## Use\n\n{use or _use(run) + _needs(run)}",
        f"## Limits\n\n{_limits(run)}",
        f"## Licence\n\n{_licence(run.spec)}",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(run: TrainedRun, facts: list[str]) -> str:
    return " ".join([*family_of(run.spec.model.family).described(run.model, run.spec.model, run.layout), *facts])


def _data(run: TrainedRun) -> str:
    manifest = run.dataset.manifest
    rows = [
        f"| {split} | {counts.impressions:,} | {counts.positives:,} |"
        for split, counts in manifest.splits.items()
        if counts.impressions
    ]
    first = manifest.split_times.train_from
    begin = "" if first is None else f"from {first}, "
    return "\n".join(
        [
            f"Data set `{_last_name(run.spec.data.uri)}`: {manifest.people}, {manifest.item_count:,} items, "
            f"{manifest.events:,} events. {_label_rule(run)} Split by global time (seconds since 1970): train "
            f"{begin}before {manifest.split_times.train_end}, valid before {manifest.split_times.valid_end}, test after.",
            "",
            "| split | impressions | positive |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            f"Text of an item: `{manifest.text.item}`, of feedback: `{manifest.text.feedback}`.",
        ]
    )


def _last_name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _label_rule(run: TrainedRun) -> str:
    rule = f"Label: 1 where feedback is at least {run.dataset.manifest.positive_from:g}, else 0."
    prepare = run.spec.prepare
    if prepare is None:
        return rule.removesuffix(".") + ", unless the log brought labels of its own."
    return f"Label: the log's column `{prepare.source.columns.label}`." if prepare.source.columns.label else rule


def _training(run: TrainedRun) -> str:
    spec, checkpoint, layout = run.spec, run.checkpoint, run.layout
    source = source_of(run.dataset, "train", layout)
    seen = Order(source.per_shard, spec.seed, spec.data.shuffle_shards).ids(0, checkpoint.position)
    rows = [_stage_row(stage) for stage in spec.stages]
    precision = checkpoint.precision or spec.train.precision
    return "\n".join(
        [
            f"{checkpoint.step:,} optimiser steps of {spec.train.batch_size} sequences: {checkpoint.position:,} sequences with "
            f"{int(source.impressions(seen).sum()):,} impressions. Seed {spec.seed}, precision {precision}, examples "
            f"`{layout.examples}`, history of {layout.history} behaviours{_retrieved(layout)}.",
            "",
            "| stage | readout over | length | learning rate of what is trained |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _retrieved(layout: Layout) -> str:
    if layout.retrieve is None:
        return ""
    by = {"vectors": "their texts", "neighbours": "what users thought of both"}[layout.retrieve_by]
    return f", of which the {layout.retrieve} most similar to the target by {by} are kept"


def _stage_row(stage: StageSpec) -> str:
    length = f"{stage.epochs:g} epochs" if stage.epochs is not None else f"{stage.steps} steps"
    rates = ", ".join(f"{group} {stage.lr[group]:g}" for group in stage.trainable)
    return f"| {stage.name} | {stage.readout.over} ({stage.readout.form}) | {length} | {rates} |"


def _metrics(run: TrainedRun) -> str:
    run_dir = run.spec.run_dir
    rows, notes = [], []
    for name in storage.list_files(storage.join(run_dir, FOLDER)):
        if name.endswith(".json"):
            path = storage.join(run_dir, FOLDER, name)
            values = kept.opened(json.loads(storage.read_bytes(path)), path)
            if values["step"] != run.checkpoint.step:
                continue
            cells = [
                "-" if values.get(key) is None else f"{values[key]:.4f}"
                for key in ("auc", "gauc", "uauc", "uauc_two", "logloss", "normalised_entropy", "calibration_error")
            ]
            split = name.removesuffix(".json")
            rows.append(f"| {split} | {values['impressions']:,} | {' | '.join(cells)} |")
            if (found := no_better_than_the_mean(values)) is not None:
                notes.append(f"\n**On {split} the model is {found}.**")
            if values.get("users") is not None:
                notes.append(
                    f"\nOn {split} GAUC and UAUC are over the {values['users']:,} users with both classes, UAUC (2) "
                    f"over the {values['users_two']:,} with at least two impressions of each."
                )
    if not rows:
        return "None: this checkpoint was not measured."
    head = "| split | impressions | AUC | GAUC | UAUC | UAUC (2) | log loss | normalised entropy | calibration error |"
    return "\n".join([head, "| --- |" + 8 * " ---: |", *rows, *notes])


_USE = """\
```python
from ctrsink.serve import Scorer

scorer = Scorer.load("path/to/this/folder")
scorer.score({"history": [{"item": {...}, "feedback": 4, "timestamp": 1}], "candidates": [{...}, {...}], "timestamp": 2})
```

{items}; timestamps are seconds. From a shell, one request a line:
`ctrsink score --model path/to/this/folder --input requests.jsonl`. After `import ctrsink` the folder also loads through
`transformers.AutoModel`; without it transformers refuses the model type, because a plain backbone would score wrongly."""


def _use(run: TrainedRun) -> str:
    reads = family_of(run.spec.model.family).reads_text or run.layout.needs_vectors
    items = (
        "An item is an object with the fields that the item text above names" if reads else "An item is an object with its `id`"
    )
    return _USE.replace("{items}", items)


def _needs(run: TrainedRun) -> str:
    """What a request must say for the signals; nothing where they need nothing of it."""
    layout, manifest = run.layout, run.dataset.manifest
    if not layout.events_of_signals:
        return ""
    columns = columns_of(layout.columns)
    fields = [field.column for field in manifest.statistics.fields] + [c.name for c in columns if c.of == "item"]
    also = f", and its {_named(fields)}" if fields else ""
    counted = _named(["item_mean", "item_count", *(column.signal for column in columns if column.received)])
    parts = [
        f"\n\nFor the signals an item also says its `id`{also}; an id that was not in the log is a new item. {counted} of the "
        "time of a behaviour may stand beside; else those of the end of the log hold, in `items.parquet`."
    ]
    if logged := [column.signal for column in columns if column.of == "log"]:
        parts.append(f"What was logged with an event stands in its item, also in candidates: {_named(logged)}.")
    if layout.base is not None:
        parts.append(f"Each candidate must say its `{layout.base}`, the logit that the model adds to, or null.")
    if "user_id" in layout.names:
        parts.append("Beside the history stands the id of the `user`.")
    if manifest.labelled:
        parts.append("Each behaviour says its `label`: 0, 1 or null.")
    return " ".join(parts)


def _named(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def _limits(run: TrainedRun) -> str:
    final = run.spec.stages[-1].learns
    early = "" if final == run.objective else " This checkpoint is of an earlier stage than the run's last."
    return (
        "Probabilities are calibrated on the training log at best: on other users, items or times measure again before use. "
        "The history is cut to the newest behaviours as in training; text in another language or form than that of the "
        f"training items was never seen.{early}"
    )


def _licence(spec: RunSpec) -> str:
    text = "The weights derive from the data named above and, where one is named, from a pretrained model: their terms apply."
    movielens = spec.prepare is not None and spec.prepare.source.kind == "movielens"
    return f"{text} {LICENCE}." if movielens else text
