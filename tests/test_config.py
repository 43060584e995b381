"""Configurations: merging, overrides, and one clear line for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config import dump_run, load_run, parse_run
from ctrsink.config.load import merge
from ctrsink.errors import InputError
from tests.builders import run_tree


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), "utf-8")
    return path


def mistake(tree: dict[str, Any], *overrides: str) -> str:
    """The message for a wrong run: one line that begins with the file."""
    for override in overrides:
        key, _, value = override.partition("=")
        leaf: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            leaf = {part: leaf}
        tree = merge(tree, leaf)
    with pytest.raises(InputError) as caught:
        parse_run(tree, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    return message.removeprefix("run.yaml: ")


def test_the_smallest_run_is_whole() -> None:
    spec = parse_run(run_tree(), "x")
    assert spec.accumulation(spec.stages[0], 1) == 4
    assert spec.model.sinks is not None
    assert spec.model.sinks.signals == ("feedback", "deviation", "item_mean", "item_count")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "unknown key train.batchsize, did you mean batch_size? (allowed: batch_size, micro_batch_size, "),
        ("tran.batch_size=3", "unknown key tran, did you mean train? (allowed: name, run_dir, seed, "),
        (
            "model.sinks.signal=[none]",
            "model.sinks.signal, did you mean signals? (allowed: signals, id_dropout, rows, buckets, embedding_size)",
        ),
        (
            "prepare.source.pth=x",
            "prepare.source.pth, did you mean path? (allowed: kind, path, items, columns, items_columns) [and 2 more]",
        ),
        (
            "data.examples=per_targt",
            "'per_targt' is not allowed, did you mean per_target? (allowed: 'per_target', 'per_request' or 'per_user')",
        ),
        (
            "model.sinks.signals=[previous_gab]",
            "signals.0: there is no signal 'previous_gab', did you mean previous_gap? (allowed: recency_rank, time_gap, ",
        ),
        ("model.sinks.signals=[zzz]", "signals.0: there is no signal 'zzz' (allowed: recency_rank, time_gap, "),
        ("model.sinks={signals: [hour], buckets: 20}", "model.sinks: hour has 24 values, more than buckets 20"),
        ("model.sinks.signals=[affinity]", "affinity cannot be told of a behaviour; allowed: recency_rank, time_gap, "),
        (
            "model.target.signals=[deviation]",
            "deviation cannot be told of a target; allowed: hour, weekday, item_id, user_id, item_mean, ",
        ),
        ("model.target.signals=[]", "name at least one signal, each once; for none set model.target to null"),
        ("model={sinks: null, bias: null, similarity: vectors}", "set it to null where sinks is null"),
        ("train.zero_stage=4", "train.zero_stage: 4 is not allowed (allowed: 0, 1, 2 or 3)"),
        ("runtime=slurm", "runtime.kind: 'slurm' is not allowed (allowed: 'local' or 'ray')"),
        ("train.batch_size=many", "train.batch_size: Input should be a valid integer"),
        ("train.batch_size=0", "train.batch_size: Input should be greater than or equal to 1 (got 0)"),
        ("model.attention=eager", "the eager backend drops the inter-sink bias without a word; allowed: sdpa, blocks or flex"),
        ("model.attention=flash_attention_2", "the flash_attention_2 backend drops the inter-sink bias without a word"),
        (
            "model.attention=flax",
            "model.attention: 'flax' is not allowed, did you mean flex? (allowed: 'sdpa', 'blocks' or 'flex')",
        ),
        ("model.attention=flex", "model.attention: flex has no backward pass on a CPU; use blocks, or runtime.device cuda"),
        ("model.sinks=null", "model: bias acts between sinks: set bias to null where sinks is null"),
        ("model.sinks.signals=[]", "name at least one signal, each once"),
        ("model.sinks.signals=[none, none]", "name at least one signal, each once"),
        ("model.backbone.path=x", "give exactly one of path and config"),
        ("model.backbone.config=null", "give exactly one of path and config"),
        ("data.uri=null", "data.uri: Input should be a valid string (got None)"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(override: str, message: str) -> None:
    assert message in mistake(run_tree(), override)


def test_a_missing_section_is_named() -> None:
    tree = run_tree()
    del tree["data"]["uri"]
    assert mistake(tree) == "missing key data.uri"
    del tree["stages"]
    assert mistake(tree) == "missing key data.uri [and 1 more]"


def stage(**fields: Any) -> dict[str, Any]:
    return run_tree()["stages"][0] | fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": None}, "stages.0: give at least one of epochs, steps and plateau: nothing would end the stage"),
        ({"steps": None, "plateau": {}}, "stages.0: a stage that only a plateau ends has no length for its schedule"),
        ({"plateau": {}}, "stages.one: plateau needs a validation sample: add train.validation"),
        ({"batch_size": 0}, "stages.0.batch_size: Input should be greater than or equal to 1"),
        ({"trainable": ["sink", "lora"]}, "no learning rate for the trainable group lora: add lr.lora"),
        ({"trainable": []}, "trainable names at least one group"),
        (
            {"trainable": ["sinks"]},
            "stages.one: 'sinks' is no group of the model, did you mean sink? (allowed: sink, bias, head, ",
        ),
        ({"lr": {"sink": 0, "head": 1}}, "the rate of sink must be above 0, got 0; to freeze it leave it out of trainable"),
        ({"lr": {"hed": 1}}, "stages.one: 'hed' is no group of the model, did you mean head?"),
        ({"lr": {"sink": 1}}, "stages.one: no learning rate for the trainable group head: add lr.head"),
        ({"objective": "cloze"}, "stages.one: objective cloze is not of this family (allowed: click)"),
        ({"objective": "clik"}, "stages.0.objective: 'clik' is not allowed, did you mean click? (allowed: 'click' or 'cloze')"),
        ({"redout": {}}, "unknown key stages.0.redout, did you mean readout? (allowed: name, objective, readout, "),
        ({"schedule": {"warmup": 1.0}}, "stages.0.schedule.warmup: Input should be less than 1"),
        ({"trainable": ["lora"], "lr": {"lora": 1}}, "stages.one: trainable lora does not exist, because model.lora is null"),
    ],
)
def test_a_wrong_stage_is_named(fields: dict[str, Any], message: str) -> None:
    assert message in mistake(run_tree(stages=[stage(**fields)]))


def test_rules_between_sections() -> None:
    backbone = run_tree()["model"]["backbone"]
    plain = {"backbone": backbone, "sinks": None, "bias": None}
    head = stage(trainable=["head"])
    assert "trainable sink does not exist, because model.sinks is null" in mistake(run_tree(model=plain))
    assert "readout over sinks needs sinks" in mistake(run_tree(model=plain, stages=[head | {"readout": {"over": "sinks"}}]))
    both = stage(trainable=["lora", "backbone"], lr={"lora": 1, "backbone": 1})
    assert "train the same weights twice" in mistake(run_tree(model={"backbone": backbone, "lora": {}}, stages=[both]))
    bare = mistake(run_tree(model=plain, stages=[head]), "data.text_history=3")
    assert "data.text_history: behaviours without a text are their sinks alone, but model.sinks is null" in bare
    assert "two stages have the same name" in mistake(run_tree(stages=[stage(), stage()]))
    assert "stages" in mistake(run_tree(stages=[]))


@pytest.mark.parametrize("signal", ["time_gap", "recency_rank", "similarity"])
def test_per_user_refuses_signals_that_depend_on_the_target(signal: str) -> None:
    message = mistake(run_tree(), "data.examples=per_user", f"model.sinks.signals=[none, {signal}]")
    assert f"model.sinks.signals: {signal} depends on the target" in message
    assert parse_run(merge(run_tree(), {"model": {"sinks": {"signals": [signal]}}}), "x").data.examples == "per_target"


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 7))
def test_accumulation_follows_from_the_batch_and_the_workers(batch: int, workers: int, micro: int) -> None:
    """As few micro-batches as hold the global batch; at any number of workers."""
    tree = run_tree(train={"batch_size": batch, "micro_batch_size": micro}, runtime={"kind": "ray", "workers": workers})
    if batch < workers:
        assert f"stages.one: a batch of {batch} sequences leaves some of {workers} workers without work" in mistake(tree)
        return
    spec = parse_run(tree, "x")
    accumulation = spec.accumulation(spec.stages[0], workers)
    assert (accumulation - 1) * workers * micro < batch <= accumulation * workers * micro


def test_elastic_workers_have_two_bounds() -> None:
    tree = run_tree(train={"batch_size": 8}, runtime={"kind": "ray", "workers": {"min": 1, "max": 4}})
    assert parse_run(tree, "x").runtime.most_workers == 4
    assert "runtime.workers" in mistake(tree, "runtime.workers={min: 3, max: 2}")
    assert "local runs one process" in mistake(tree, "runtime.kind=local")
    assert "without work" in mistake(tree, "runtime.workers.max=9")


def test_offload_needs_something_to_move() -> None:
    assert "offload needs zero_stage 1, 2 or 3" in mistake(run_tree(train={"offload": True, "zero_stage": 0}))


def test_local_runs_one_process() -> None:
    assert "local runs one process, got workers 2; for more set kind to ray" in mistake(run_tree(), "runtime.workers=2")
    assert parse_run(run_tree(runtime="ray"), "x").runtime.kind == "ray"


def test_overrides_reach_any_section(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", run_tree())
    overrides = [
        "seed=3",
        "train.batch_size=64",
        "model.sinks.signals=[none, random]",
        "name=a=b",
        "model.bias=null",
        "runtime=ray",
    ]
    spec = load_run(path, overrides)
    assert (spec.seed, spec.train.batch_size, spec.name, spec.model.bias) == (3, 64, "a=b", None)
    assert spec.model.sinks is not None
    assert spec.model.sinks.signals == ("none", "random")
    assert spec.runtime.kind == "ray"
    assert load_run(path, ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(InputError, match=r"run\.yaml: unknown key train\.zero, did you mean zero_stage\?"):
        load_run(path, ["train.zero=1"])


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[1"])
def test_a_malformed_override_is_shown(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "run.yaml", run_tree())
    with pytest.raises(InputError, match="override") as caught:
        load_run(path, [text])
    assert text in str(caught.value)


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text, and a backbone's configuration would carry it as text to transformers."""
    text = yaml.safe_dump(run_tree()).replace("model_type: llama", "{model_type: llama, rms_norm_eps: 1e-6, rope_theta: 1e6}")
    text = text.replace("config:\n        {", "config: {")
    spec = load_run(write(tmp_path / "run.yaml", text), ["train.weight_decay=1E-3"])
    assert spec.model.backbone.config == {"model_type": "llama", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    assert spec.train.weight_decay == 1e-3


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", yaml.safe_dump(run_tree()) + "data:\n  uri: elsewhere\n")
    with pytest.raises(InputError, match="the key data stands twice") as caught:
        load_run(path)
    assert "\n" not in str(caught.value)


def test_includes_merge_from_first_to_last_under_the_file_itself(tmp_path: Path) -> None:
    write(tmp_path / "parts/a.yaml", {"train": {"batch_size": 16, "log_every": 3}, "seed": 1, "name": "a"})
    write(tmp_path / "parts/b.yaml", {"include": ["deep/c.yaml"], "train": {"log_every": 5}, "seed": 2})
    write(tmp_path / "parts/deep/c.yaml", {"train": {"checkpoint_every": 7, "log_every": 9}})
    path = write(tmp_path / "run.yaml", run_tree(include=["parts/a.yaml", "parts/b.yaml"], seed=3))
    spec = load_run(path)
    assert (spec.name, spec.seed) == ("a", 3)
    assert (spec.train.batch_size, spec.train.log_every, spec.train.checkpoint_every) == (16, 5, 7)


def test_the_same_fragment_twice_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"seed": 8})
    for name in ("a.yaml", "b.yaml"):
        write(tmp_path / name, {"include": ["base.yaml"]})
    assert load_run(write(tmp_path / "run.yaml", run_tree(include=["a.yaml", "b.yaml"]))).seed == 8


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"include": ["run.yaml"]}, "includes itself"),
        ({"include": ["../{name}/run.yaml"]}, "includes itself"),
        ({"include": ["none.yaml"]}, "cannot read the configuration .*none.yaml: No such file"),
        ({"include": "a.yaml"}, "include must be a list of file names"),
        ("- 1\n", "expected a mapping at the top, got list"),
        ("", "expected a mapping at the top, got NoneType"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, tree: Any, message: str) -> None:
    if isinstance(tree, dict) and isinstance(tree["include"], list):
        tree = {"include": [name.format(name=tmp_path.name) for name in tree["include"]]}
    path = write(tmp_path / "run.yaml", tree)
    with pytest.raises(InputError, match=message) as caught:
        load_run(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the configuration .*nothing\.yaml"):
        load_run(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_run(tmp_path)


trees = st.recursive(
    st.integers(0, 3) | st.none(), lambda t: st.dictionaries(st.sampled_from("abc"), t, max_size=3), max_leaves=8
)
mappings = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(mappings, mappings)
def test_merging_lets_the_top_win_and_changes_neither(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert merge(a, {}) == a
    assert merge({}, a) == a
    assert merge(a, a) == a
    before = repr((a, b))
    merged = merge(a, b)
    assert merged.keys() == a.keys() | b.keys()
    for key in merged:
        both = isinstance(a.get(key), dict) and isinstance(b.get(key), dict)
        assert merged[key] == (merge(a[key], b[key]) if both else b[key] if key in b else a[key])
    assert repr((a, b)) == before


@given(
    st.sampled_from([None, {"rank": 3}]),
    st.sampled_from(["per_target", "per_user"]),
    st.lists(st.sampled_from(["previous_gap", "random", "none", "feedback", "deviation"]), min_size=1, max_size=3, unique=True),
    st.floats(1e-8, 1),
    st.sampled_from(["plain", "1e5", "no", "ünï", " x ", "2024-01-01", "010", "1:30"]),
    st.booleans(),
)
@settings(max_examples=40)
def test_a_dumped_run_reads_back_equal(
    lora: dict[str, int] | None, examples: str, signals: list[str], rate: float, name: str, whole: bool
) -> None:
    tree = merge(run_tree(name=name), {"model": {"lora": lora, "sinks": {"signals": signals}}, "data": {"examples": examples}})
    tree["stages"] = [stage(lr={"sink": rate, "head": 1}), stage(name="two", steps=None, epochs=rate)]
    if whole:
        tree["prepare"] = {"source": {"path": "log"}, "tokenizer": {"train_vocabulary": 400}}
    spec = parse_run(tree, "x")
    again = parse_run(yaml.safe_load(dump_run(spec)), "dumped")
    assert again == spec
    assert dump_run(again) == dump_run(spec)


def test_per_request_needs_a_token_budget() -> None:
    tree = run_tree(data={"uri": "data", "examples": "per_request"})
    with pytest.raises(InputError, match=r"bound the memory of a micro-batch with train\.micro_batch_tokens"):
        parse_run(tree, "x")
    assert parse_run({**tree, "train": {"micro_batch_tokens": 100}}, "x").train.micro_batch_tokens == 100


def test_a_dumped_run_is_a_configuration_file(tmp_path: Path) -> None:
    spec = load_run(write(tmp_path / "run.yaml", run_tree()), ["train.weight_decay=1e-7", "model.lora={rank: 2}"])
    assert load_run(write(tmp_path / "again.yaml", dump_run(spec))) == spec


def test_a_run_cannot_be_changed() -> None:
    spec = parse_run(run_tree(), "x")
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_an_override_reaches_into_a_list() -> None:
    tree = {"stages": [{"name": "a", "lr": {"head": 1, "sink": 2}}, {"name": "b"}]}
    assert merge(tree, {"stages": {"0": {"lr": {"head": 3}}}})["stages"] == [
        {"name": "a", "lr": {"head": 3, "sink": 2}},
        {"name": "b"},
    ]
    assert merge(tree, {"stages": [{"name": "d"}]})["stages"] == [{"name": "d"}]


@pytest.mark.parametrize(
    ("override", "value", "message"),
    [
        ("data.history=010", 10, ""),  # in YAML 1.1 it is 8
        ("data.history=0x10", 16, ""),
        ("data.history=1_000", 1000, ""),
        ("data.history=1:30", None, "data.history: .* integer"),  # in YAML 1.1 it is 90
        ("data.history=true", None, "data.history: true is no number"),
        ("seed=false", None, "seed: false is no number"),
        ("stages.0.lr={sink: true}", None, r"stages\.0\.lr\.sink: true is no number"),
        ("train.betas=[false, 0.9]", None, r"train\.betas\.0: false is no number"),
    ],
)
def test_a_number_is_what_it_looks_like(tmp_path: Path, override: str, value: int | None, message: str) -> None:
    path = write(tmp_path / "run.yaml", run_tree())
    if value is not None:
        assert load_run(path, [override]).data.history == value
    else:
        with pytest.raises(InputError, match=message):
            load_run(path, [override])


def test_a_date_written_together_is_no_second(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", run_tree(prepare={"source": {"path": "log"}, "tokenizer": {"train_vocabulary": 400}}))
    with pytest.raises(InputError, match="20240501 would be a second of the year 1970: write the date as 2024-05-01"):
        load_run(path, ["prepare.split={train_end: 20240501, valid_end: 20240601}"])
