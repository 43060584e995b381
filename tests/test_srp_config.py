"""The section of the family srp: what is refused before a worker starts, and how it says so."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctrsink.config import RunSpec, dump_run, load_run, parse_run
from ctrsink.config.model import SrpSpec

PRETRAIN: dict[str, Any] = {
    "name": "pretrain", "objective": "cloze", "steps": 1, "trainable": ["ids", "embedding", "encoder", "cloze"],
    "lr": {"ids": 1e-3, "embedding": 1e-3, "encoder": 1e-3, "cloze": 1e-3, "tower": 1e-3, "queries": 1e-3},
}  # fmt: skip
CLICK: dict[str, Any] = {
    "name": "ctr", "steps": 1, "trainable": ["ids", "cross", "queries", "tower"],
    "lr": {"ids": 1e-3, "cross": 1e-3, "queries": 1e-3, "tower": 1e-3, "cloze": 1e-3},
}  # fmt: skip


def run_of(stages: tuple[dict[str, Any], ...] = (PRETRAIN, CLICK), data: dict[str, Any] | None = None, **model: Any) -> RunSpec:
    plain = {"run_dir": "runs/x", "data": {"uri": "data"} | (data or {}), "model": {"family": "srp"} | model, "stages": stages}
    return RunSpec.model_validate(plain | {"train": {"micro_batch_tokens": 100}})


def test_pre_training_and_clicks_are_two_stages_of_one_run() -> None:
    spec = run_of()
    assert isinstance(spec.model, SrpSpec)
    assert [stage.learns.kind for stage in spec.stages] == ["cloze", "click"]
    assert run_of((CLICK,), {"examples": "per_request", "history": 200}).model == spec.model
    assert run_of(data={"history": 500, "retrieve": 50}).model == spec.model
    frozen = CLICK | {"trainable": ["cross", "queries", "tower"]}
    assert run_of((PRETRAIN, frozen)).stages[1].trainable == ("cross", "queries", "tower")
    # A table that targets alone have is trained with what reads targets.
    told = {"behaviours": ["feedback"], "target": ["user_id"]}
    assert run_of((frozen,), **told).model.ids == ()
    with pytest.raises(ValidationError, match="trainable ids does not exist, because no signal is item_id or user_id"):
        run_of((CLICK,), **told)


@pytest.mark.parametrize(
    ("stages", "data", "model", "message"),
    [
        ((CLICK,), {"examples": "per_user"}, {}, "data.examples per_user: the encoder reads a history in both directions"),
        ((CLICK,), {"history": 201}, {}, "data.history 201 is more than the 200 positions of model.max_history"),
        ((CLICK,), {"history": 300, "retrieve": 201}, {}, "data.retrieve 201 is more than the 200 positions"),
        ((CLICK,), {"history": 50}, {"max_history": 49}, "data.history 50 is more than the 49 positions"),
        ((CLICK, PRETRAIN), {}, {}, "stages.pretrain: the last stage's objective must be click: a run ends with"),
        (
            (PRETRAIN | {"trainable": ["cloze", "tower"]}, CLICK), {}, {},
            "stages.pretrain: objective cloze does not use the group tower: it trains ids, embedding, encoder and cloze only",
        ),
        ((PRETRAIN | {"trainable": ["ids"]}, CLICK), {}, {}, "stages.pretrain: objective cloze needs its heads trained"),
        ((CLICK | {"trainable": ["ids", "cloze"]},), {}, {}, "stages.ctr: objective click does not use the group cloze"),
        ((PRETRAIN, CLICK), {}, {"behaviours": ["deviation"]}, "objective cloze foretells categories, and model.behaviours has"),
        ((PRETRAIN, CLICK), {"history": 0}, {}, "objective cloze foretells fields of behaviours, and data.history is 0"),
        (
            (PRETRAIN, CLICK), {"retrieve": 5}, {"behaviours": ["item_id", "similarity"]},
            "stages.pretrain: objective cloze hides items, and the signal similarity would give them away",
        ),
        ((CLICK,), {}, {"queries": 0}, "stages.ctr: trainable queries does not exist, because model.queries is 0"),
        ((CLICK,), {}, {"heads": 3}, "width 64 is no multiple of heads 3"),
        ((CLICK,), {}, {"tower": []}, "tower"),
        ((CLICK,), {}, {"mask_ratio": 0}, "mask_ratio"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(
    stages: tuple[dict[str, Any], ...], data: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        run_of(stages, data, **model)
    assert message in str(raised.value)
    assert raised.value.error_count() == 1


def test_the_example_loads() -> None:
    path = Path(__file__).resolve().parent.parent / "configs/movielens-1m-srp.yaml"
    spec = load_run(path)
    assert parse_run(dump_run_plain(spec), "x") == spec
    assert isinstance(spec.model, SrpSpec)
    assert spec.model.queries == 8


def dump_run_plain(spec: RunSpec) -> Any:
    import yaml

    return yaml.safe_load(dump_run(spec))
