"""The section `model` of each family: what it may hold, what it replaces, and which groups stages may name."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ctrsink.config import dump_run, load_run, parse_run
from ctrsink.config.load import merge
from ctrsink.config.model import DecoderSpec, DinSpec, FamilySpec, ModelSpec
from ctrsink.errors import InputError
from ctrsink.families.registry import FAMILIES
from tests.builders import run_tree
from tests.test_config import mistake, stage, write

BACKBONE = {"backbone": {"config": {"model_type": "llama"}}}
SECTIONS: dict[str, type[FamilySpec]] = {
    get_args(section.model_fields["family"].annotation)[0]: section
    for section, _ in map(get_args, get_args(get_args(ModelSpec)[0]))
}
"""Of each family."""


def din_tree(**sections: Any) -> dict[str, Any]:
    stages = [stage(trainable=["ids", "model"], lr={"ids": 0.01, "model": 0.01})]
    return run_tree(model={"family": "din"}, stages=stages) | sections


def test_every_family_has_a_section_and_its_groups() -> None:
    assert SECTIONS.keys() == set(FAMILIES)
    assert all(len(section.GROUPS) > 2 for section in SECTIONS.values())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "dinn"}, "model: family 'dinn' is not allowed, did you mean din? (allowed: 'decoder', 'din'"),
        ({"family": "zzzz"}, "model: family 'zzzz' is not allowed (allowed: 'decoder', 'din'"),
        ({"family": None}, "model: family 'null' is not allowed (allowed: 'decoder', 'din'"),
        ({"family": ["din"]}, "model: family \"['din']\" is not allowed"),
        (3, "model: Input should be a mapping of keys (got 3)"),
        (None, "model: Input should be a mapping of keys (got None)"),
    ],
)
def test_an_unknown_family_is_named_with_those_there_are(model: Any, message: str) -> None:
    assert mistake(run_tree(model=model)).startswith(message)


@pytest.mark.parametrize("family", [None, *SECTIONS])
def test_an_unknown_key_is_named_with_the_keys_of_its_own_family(family: str | None) -> None:
    model: dict[str, Any] = {"zzzzzz": 3} | (BACKBONE if family in (None, "decoder") else {})
    allowed = ", ".join(SECTIONS[family or "decoder"].model_fields)
    named = {} if family is None else {"family": family}
    assert mistake(run_tree(model=model | named)).startswith(f"unknown key model.zzzzzz (allowed: {allowed})")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "din", "sinks": None}, "unknown key model.sinks (allowed: base, behaviours, target, "),
        ({"family": "din", "behavours": []}, "unknown key model.behavours, did you mean behaviours? (allowed: base, "),
        (BACKBONE | {"behaviours": ["item_id"]}, "unknown key model.behaviours (allowed: base, family, backbone, "),
        ({"family": "din", "rows": 1}, "model.rows: Input should be greater than or equal to 2 (got 1)"),
        ({"family": "din", "layers": ["x"]}, "model.layers.0: Input should be a valid integer"),
        ({"family": "din", "target": ["deviation"]}, "model.target: deviation cannot be told of a target; allowed: hour, "),
        ({"family": "decoder", "sinks": {"signal": []}, **BACKBONE}, "unknown key model.sinks.signal, did you mean signals?"),
        ({"family": "decoder"}, "missing key model.backbone"),
    ],
)
def test_mistakes_are_told_by_keys_that_say_nothing_of_the_union(model: dict[str, Any], message: str) -> None:
    assert mistake(run_tree(model=model)).startswith(message)


def test_a_section_that_names_no_family_is_a_decoder() -> None:
    assert isinstance(parse_run(run_tree(), "x").model, DecoderSpec)
    assert parse_run(run_tree(model=BACKBONE | {"family": "decoder"}), "x") == parse_run(run_tree(model=BACKBONE), "x")
    assert isinstance(parse_run(din_tree(), "x").model, DinSpec)


def test_another_family_replaces_the_section_below_whole(tmp_path: Path) -> None:
    """Its keys were meant for the other one; the same family is merged key by key, as any section is."""
    decoder = BACKBONE | {"sinks": {"buckets": 50}, "lora": {"rank": 2}}
    din = {"family": "din", "rows": 30, "width": 8}
    assert merge({"model": decoder}, {"model": din}) == {"model": din}
    assert merge({"model": din}, {"model": decoder | {"family": "decoder"}}) == {"model": decoder | {"family": "decoder"}}
    assert merge({"model": din}, {"model": {"family": "din", "rows": 40}}) == {"model": din | {"rows": 40}}
    assert merge({"model": din}, {"model": {"rows": 40}}) == {"model": din | {"rows": 40}}
    assert merge({"model": decoder}, {"model": {"family": "decoder", "lora": None}}) == {
        "model": decoder | {"family": "decoder", "lora": None}
    }
    # Elsewhere the name `family` means nothing.
    assert merge({"data": {"a": {"b": 1}}}, {"data": {"a": {"family": "din"}}}) == {"data": {"a": {"b": 1, "family": "din"}}}


def test_a_family_is_chosen_by_an_override_and_by_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", run_tree(model=BACKBONE | {"lora": {"rank": 2}}))
    stages = "stages=[{name: one, trainable: [ids, model], lr: {ids: 0.1, model: 0.1}, steps: 3}]"
    spec = load_run(path, ["model={family: din}", stages, "model.width=8"])
    assert spec.model == DinSpec(family="din", width=8)
    write(tmp_path / "base.yaml", run_tree(model=BACKBONE))
    above = write(tmp_path / "above.yaml", {"include": ["base.yaml"], **din_tree()})
    assert load_run(above).model == DinSpec(family="din")
    with pytest.raises(InputError, match=r"above\.yaml: unknown key model\.backbone, "):
        load_run(above, ["model.backbone.config.model_type=llama"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ["backbone"]}, "stages.one: 'backbone' is no group of the model (allowed: ids, embedding, model)"),
        ({"trainable": ["modle"]}, "stages.one: 'modle' is no group of the model, did you mean model? (allowed: ids, "),
        ({"lr": {"ids": 1, "model": 1, "sink": 1}}, "stages.one: 'sink' is no group of the model (allowed: ids, "),
        ({"trainable": ["ids", "embedding"]}, "stages.one: no learning rate for the trainable group embedding"),
        ({"trainable": ["model"]}, "stages: none trains the group ids, which the signal item_id has its embeddings in"),
        ({"objective": "cloze"}, "stages.one: objective cloze is not of this family (allowed: click)"),
    ],
)
def test_stages_name_groups_and_objectives_of_the_family(fields: dict[str, Any], message: str) -> None:
    tree = din_tree()
    tree["stages"][0] |= fields
    assert message in mistake(tree)


def test_a_group_that_the_section_leaves_empty_is_not_trained() -> None:
    tree = din_tree(model={"family": "din", "behaviours": ["feedback"], "target": ["item_mean"]})
    assert "stages.one: trainable ids does not exist, because no signal is item_id or user_id" in mistake(tree)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.text_history=3", "data.text_history: this family reads no text: leave it out"),
        ("model={family: din, behaviours: [time_gap]}", "model.behaviours: time_gap depends on the target"),
    ],
)
def test_rules_between_a_family_without_text_and_other_sections(override: str, message: str) -> None:
    tree = din_tree(data={"uri": "data", "examples": "per_user"})
    assert message in mistake(tree, override)


def test_a_dumped_run_of_any_family_reads_back_equal() -> None:
    spec = parse_run(din_tree(), "x")
    assert parse_run(yaml.safe_load(dump_run(spec)), "dumped") == spec
