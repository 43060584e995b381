"""What a report says of a look into a run (ctrsink.report.look): attention to sinks, and what signals are worth."""

from functools import partial
from typing import Any

from ctrsink.report.look_figures import attention_by_layer, attention_map, worth_of_signals
from ctrsink.report.page import SIZE, Figure, Note, Part, Section, Table

ATTENTION, SIGNALS = "Attention to sinks", "Signals"
_SHORT = {"untrained": "before", "trained": "after", "without_bias": "biases at 0"}
_CALLED = {"untrained": "before training", "trained": "after training", "without_bias": "after training, biases set to 0"}


def look_sections(found: dict[str, Any] | str) -> list[Section]:
    """Both sections, of what `look` found, or of why there was no look."""
    if isinstance(found, str):
        return [Section(title, [Note(found, missing=True)]) for title in (ATTENTION, SIGNALS)]
    sample = f"On a fixed random sample of {found['split']} with {found['impressions']:,} impressions."
    return [_attention(found.get("attention_to_sinks"), sample), _signals(found["signals"], sample)]


def _attention(found: dict[str, dict[str, list[float]]] | None, sample: str) -> Section:
    if not found:
        return Section(ATTENTION, [Note("The model has no sinks, so no attention goes to them.", missing=True)])
    shares = [share for layers in found.values() for heads in layers.values() for share in heads]
    if not shares:
        return Section(ATTENTION, [Note(f"{sample} No target has a history, so nobody looks back.", missing=True)])
    heads, layers = max(len(own) for own in found["trained"].values()), len(found["trained"])
    size = (SIZE[0], min(8.0, 1.1 + 0.32 * layers))
    parts: list[Part] = [
        Figure("Mean over heads (line) and every head (points), by layer.", partial(attention_by_layer, found=found))
    ]
    parts += [
        Figure(f"By layer and head, {_CALLED[name]}; the full colour is {max(shares):.0%}.",
               partial(attention_map, layers=own, most=max(shares)), size)
        for name, own in found.items()
    ]  # fmt: skip
    rows = [
        (layer.removeprefix("layer"), *[f"{sum(found[name][layer]) / len(found[name][layer]):.1%}" for name in found])
        for layer in found["trained"]
    ]
    parts.append(Table(("layer", *[_SHORT[name] for name in found]), rows, caption="Mean over heads"))
    what = f"the share that goes to sinks ({layers} layers, {heads} heads)"
    lead = f"Of the attention that a target pays to its history, {what}. {sample}"
    return Section(ATTENTION, parts, lead)


def _signals(found: dict[str, dict[str, float]], sample: str) -> Section:
    if not found:
        return Section(SIGNALS, [Note("Targets are told no number: model.target.signals names none.", missing=True)])
    names = sorted(found, key=lambda name: -found[name]["auc"])
    rows = [(name, f"{found[name]['auc']:+.4f}", f"{found[name]['logloss']:+.4f}") for name in names]
    size = (SIZE[0], 1.0 + 0.26 * len(names))
    return Section(
        SIGNALS,
        [
            Figure("AUC lost where a signal is set to its mean.", partial(worth_of_signals, signals=found), size),
            Note(sample),
            Table(("signal", "AUC lost", "log loss gained"), rows),
        ],
        "What each number that targets are told is worth to this model, without training anew; what is small may be chance.",
    )
