"""The scorer gives the evaluator's probabilities, takes only requests it can answer, and needs nothing of training."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.evaluate.evaluator import predict
from ctrsink.evaluate.predictions import Predictions
from ctrsink.export.package import export_run
from ctrsink.serve import Scorer, request_of, score_file
from ctrsink.serve.encoding import CANDIDATES, RequestEncoder
from ctrsink.train.restore import restore_run
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run

READOUTS = [{"over": "all", "form": "attend"}, {"over": "sinks", "form": "attend"}, {"over": "sinks", "form": "pool"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def model(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported model with sinks, bias and merged LoRA."""
    folder = tmp_path_factory.mktemp("model")
    spec = run_spec(data, str(folder / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(folder / "out"))
    return str(folder / "out")


def predictions(run_dir: str, split: str) -> Predictions:
    run = restore_run(run_dir)
    spec = EvaluateSpec(batch_size=3)
    return predict(lambda batch: run.model(batch, run.objective), run.dataset, split, run.layout, spec)


def scores(scorer: Scorer, dataset: Dataset, of: Predictions) -> np.ndarray:
    """Probability of each predicted event, from requests alone."""
    requests = [request_of(dataset, user, event) for user, event in zip(of.users.tolist(), of.events.tolist(), strict=True)]
    return np.array([scorer.score(json.loads(json.dumps(request)))[0] for request in requests])


@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: "-".join(r.values()))
def test_scores_equal_the_evaluators_per_target(data: Prepared, tmp_path: Path, readout: dict[str, str]) -> None:
    spec = run_spec(data, str(tmp_path / "run"), readout=readout)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    for split in ("train", "test"):
        expected = predictions(spec.run_dir, split)
        assert np.ptp(expected.probabilities) > 0.05
        np.testing.assert_allclose(scores(scorer, dataset, expected), expected.probabilities, atol=1e-5)


@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: "-".join(r.values()))
def test_scores_equal_the_evaluators_per_user_where_the_history_is_the_same(
    data: Prepared, tmp_path: Path, readout: dict[str, str]
) -> None:
    sinks = {"signals": ["previous_gap"], "buckets": 20, "embedding_size": 8}
    spec = run_spec(
        data, str(tmp_path / "run"), model={"sinks": sinks}, readout=readout, examples="per_user", history=2, targets=3
    )
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    expected = predictions(spec.run_dir, "train")
    # A piece starts two behaviours before the first of its three targets, a request four before its only one.
    firsts = [
        events[i // 3 * 3] for u in range(5) for events in [expected.events[expected.users == u]] for i in range(len(events))
    ]
    same = np.maximum(0, np.array(firsts) - 2) == np.maximum(0, expected.events - (2 + 3 - 1))
    assert same.sum() > 8
    found = scores(scorer, dataset, expected)
    np.testing.assert_allclose(found[same], expected.probabilities[same], atol=1e-5)
    # Elsewhere a request sees more of the past than the evaluator's piece does.
    assert (~same).sum() > 0
    assert np.abs(found - expected.probabilities)[~same].max() > 1e-4


def test_bf16_scores_stay_near(data: Prepared, model: str, tmp_path: Path) -> None:
    export_run(str(Path(model).parent / "run"), str(tmp_path / "half"), "bf16")
    dataset = Dataset(data.uri)
    request = request_of(dataset, 1, 6, [0, 1, 2, 3])
    found, expected = Scorer.load(str(tmp_path / "half")).score(request), Scorer.load(model).score(request)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_candidates_are_scored_apart_and_in_order(data: Prepared, model: str) -> None:
    scorer, dataset = Scorer.load(model), Dataset(data.uri)
    together = scorer.score(request_of(dataset, 2, 5, [0, 1, 2] * 15))
    apart = [scorer.score(request_of(dataset, 2, 5, [item]))[0] for item in (0, 1, 2)]
    assert len(set(apart)) == 3
    np.testing.assert_allclose(together, apart * 15, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("readout", READOUTS, ids=lambda r: "-".join(r.values()))
@pytest.mark.parametrize("examples", ["per_request", "per_user"])
def test_many_candidates_behind_one_history_score_as_one_by_one(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: str, readout: dict[str, str], window: int | None
) -> None:
    """With the temporal bias and a window, which travel with the exported model."""
    signals = ["previous_gap"] if examples == "per_user" else ["time_gap", "recency_rank"]
    more = {"sinks": {"signals": signals, "buckets": 20, "embedding_size": 8}, "temporal": True, "window": window}
    spec = run_spec(data, str(tmp_path / "run"), model=more, readout=readout, examples=examples, targets=3)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    assert scorer.model.ctr.window == window
    assert any(p.abs().max() > 0.01 for p in scorer.model.ctr.temporal.parameters())
    chance = np.random.default_rng(0)
    request = request_of(dataset, 2, 5, chance.integers(0, 6, 64).tolist())
    sizes: list[int] = []
    count = lambda module, args, kwargs: sizes.append(int(kwargs["batch"].tokens if kwargs else args[0].tokens))  # noqa: E731
    handle = scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    together = scorer.score(request)
    assert len(sizes) == 1
    apart = [scorer.score(request | {"candidates": [candidate]})[0] for candidate in request["candidates"]]
    handle.remove()
    # The history is computed once: 64 candidates take far fewer tokens than 64 requests.
    assert 2 * sizes[0] < sum(sizes[1:])
    assert len(set(np.round(apart, 6))) == len({json.dumps(c) for c in request["candidates"]})
    np.testing.assert_allclose(together, apart, atol=1e-5)
    # More than are scored at once: in parts, in order.
    monkeypatch.setattr(module_of(RequestEncoder), "CANDIDATES", 9)
    np.testing.assert_allclose(scorer.score(request), apart, atol=1e-5)


def module_of(kind: type) -> Any:
    return sys.modules[kind.__module__]


def test_more_candidates_than_are_scored_at_once(data: Prepared, model: str) -> None:
    scorer, dataset = Scorer.load(model), Dataset(data.uri)
    apart = [scorer.score(request_of(dataset, 2, 5, [item]))[0] for item in range(6)]
    for count in (CANDIDATES, CANDIDATES + 1, 2 * CANDIDATES + 5):
        items = [i % 6 for i in range(count)]
        np.testing.assert_allclose(scorer.score(request_of(dataset, 2, 5, items)), [apart[i] for i in items], atol=1e-5)


@pytest.mark.parametrize("examples", ["per_target", "per_request"])
def test_scores_equal_the_evaluators_with_temporal_bias_and_window(data: Prepared, tmp_path: Path, examples: str) -> None:
    spec = run_spec(data, str(tmp_path / "run"), model={"temporal": True, "window": 2}, examples=examples, targets=3)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    expected = predictions(spec.run_dir, "train")
    np.testing.assert_allclose(
        scores(Scorer.load(str(tmp_path / "out")), Dataset(data.uri), expected), expected.probabilities, atol=1e-5
    )


def test_history_is_sorted_by_time_and_may_be_empty(data: Prepared, model: str) -> None:
    scorer, dataset = Scorer.load(model), Dataset(data.uri)
    request = request_of(dataset, 0, 6, [0, 1])
    expected = scorer.score(request)
    turned = request | {"history": request["history"][::-1]}
    assert scorer.score(turned) == expected
    empty = scorer.score(request | {"history": []})
    assert all(0 < p < 1 for p in empty)
    assert empty != expected
    assert scorer.score({k: request[k] for k in ("candidates", "timestamp")}) == empty


def test_only_the_window_of_the_history_counts_but_signals_know_what_lies_before(data: Prepared, model: str) -> None:
    scorer, dataset = Scorer.load(model), Dataset(data.uri)
    request = request_of(dataset, 0, 7, [0])
    longer = copy.deepcopy(request)
    for behaviour in longer["history"][:3]:  # of seven; four fit
        behaviour["item"]["title"], behaviour["feedback"] = "Another Movie", 1
    assert scorer.score(longer) == scorer.score(request)
    longer["history"][3]["item"]["title"] = "Another Movie"
    assert scorer.score(longer) != scorer.score(request)


def test_feedback_and_fields_are_rendered_as_in_preparation(data: Prepared, model: str) -> None:
    scorer, dataset = Scorer.load(model), Dataset(data.uri)
    request = request_of(dataset, 3, 6, [1])
    expected = scorer.score(request)
    loose = copy.deepcopy(request)
    for behaviour in loose["history"]:
        year = behaviour["item"]["year"]
        behaviour["item"]["year"] = int(year) if year else None
        behaviour["item"]["unused"] = {"any": "thing"}
        if behaviour["feedback"] is None:
            del behaviour["feedback"]
        else:
            behaviour["feedback"] = int(behaviour["feedback"])
    assert scorer.score(loose) == expected
    absent = copy.deepcopy(request)
    newest = absent["history"][-1]
    newest["feedback"] = 5 if newest["feedback"] is None else None
    assert scorer.score(absent) != expected


def change(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def apply(request: dict[str, Any]) -> Any:
        request[key] = value
        return request

    return apply


def without_year(request: dict[str, Any]) -> Any:
    del request["history"][1]["item"]["year"]
    return request


def late(request: dict[str, Any]) -> Any:
    request["history"][2]["timestamp"] = request["timestamp"] + 1
    return request


BAD = [
    (change("candidates", []), "candidates: "),
    (change("candidates", [{"title": "A"}]), "candidates.0 has no field 'year'"),
    (change("candidates", [{"title": {"en": "A"}, "year": ""}]), "candidates.0.title: an object is no text"),
    (change("timestamp", "now"), "timestamp: "),
    (change("timestamp", 1.7e12), "timestamp: "),
    (change("histroy", []), "unknown key histroy, did you mean history"),
    (
        change("history", [{"item": {}, "timestamp": 1, "feedback": 1e39}]),
        "history.0.feedback: Input should be less than",
    ),
    (change("history", [7]), "history.0: Input should be a mapping of keys .got 7."),
    (without_year, "history.1.item has no field 'year'"),
    (late, "history.2.timestamp .* is later than the request's"),
    (change("user", "\ud800"), "user: "),
    (lambda _: [1, 2], "Input should be a mapping of keys"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_line_is_named_and_nothing_is_written(
    data: Prepared, model: str, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    good = request_of(Dataset(data.uri), 0, 5)
    lines = [json.dumps(good), json.dumps(spoil(copy.deepcopy(good)))]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"requests.jsonl, line 2: .*{message}"):
        score_file(model, str(tmp_path / "requests.jsonl"), str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_that_are_no_json_and_files_that_are_none(data: Prepared, model: str, tmp_path: Path) -> None:
    good = json.dumps(request_of(Dataset(data.uri), 0, 5)).encode()
    for content, message in ((good + b"\n{", "line 2: not a JSON"), (b"\xff\n", "line 1: not a JSON"), (b"", "is empty")):
        (tmp_path / "requests.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=message):
            score_file(model, str(tmp_path / "requests.jsonl"))
    with pytest.raises(InputError, match=r"none.jsonl does not exist"):
        score_file(model, str(tmp_path / "none.jsonl"))


def test_a_file_of_requests_in_a_process_without_the_engines_of_training(data: Prepared, model: str, tmp_path: Path) -> None:
    dataset = Dataset(data.uri)
    requests = [request_of(dataset, 0, 5, [0, 1]) | {"id": "ü\u2028"}, request_of(dataset, 1, 2, [2])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in requests), "utf-8")
    program = """
import sys
from ctrsink.serve import score_file
counts = score_file(*sys.argv[1:3])
print(counts, sorted({"ray", "deepspeed", "peft", "tensorboard"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, model, str(tmp_path / "in.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "{'requests': 2, 'candidates': 3} []"
    rows = [json.loads(line) for line in lines]
    assert rows[0].pop("id") == "ü\u2028"
    assert [set(row) for row in rows] == [{"probabilities"}] * 2
    scorer = Scorer.load(model)
    for row, request in zip(rows, requests, strict=True):
        np.testing.assert_allclose(row["probabilities"], scorer.score(request), atol=1e-6)


def parts(content: bytes) -> dict[str, Any]:
    return json.loads(content)


def edited(content: bytes, **changes: Any) -> bytes:
    return json.dumps(parts(content) | changes).encode()


def within(content: bytes, section: str, **changes: Any) -> bytes:
    return edited(content, **{section: parts(content)[section] | changes})


def test_a_model_that_says_more_of_its_data_is_read(data: Prepared, model: str, tmp_path: Path) -> None:
    """As those that were exported before the number of items was found to be of no use to any family."""
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_bytes(within(path.read_bytes(), "facts", items=7, feedbacks=3))
    Scorer.load(str(tmp_path / "model"))


def test_a_folder_that_is_no_whole_model_is_refused(data: Prepared, model: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model"):
        Scorer.load(str(tmp_path))
    for name, spoil, message in (
        ("model.safetensors", lambda b: b[: len(b) // 2], "is damaged"),
        ("tokenizer.json", lambda b: b.replace(b'"add_prefix_space":false', b'"add_prefix_space":true').replace(
            b'"add_prefix_space": false', b'"add_prefix_space": true'), "not the one the model was trained with"),
        ("config.json", lambda b: edited(b, model_type="llama"), "of type llama"),
        ("config.json", lambda b: b.replace(b"ctrsink-model/4", b"ctrsink-model/9"), "has the format ctrsink-model/9"),
        ("config.json", lambda b: b.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'), "do not fit"),
        ("config.json", lambda b: b[:-9], "config.json is damaged"),
        ("config.json", lambda b: b.replace(b'"prefix_tokens"', b'"prefix"'), "config.json is damaged .unknown key 'prefix'"),
        ("config.json", lambda b: edited(b, text=None), "config.json is damaged .missing key text"),
        ("config.json", lambda b: edited(b, text={"itm": "{title}"}), "damaged .text: unknown key itm, did you mean item"),
        ("config.json", lambda b: edited(b, layout={"examples": "per_target"}), "damaged .layout: "),
        ("config.json", lambda b: within(b, "model", window="wide"), "damaged .model: window: Input should be a valid integer"),
        ("config.json", lambda b: within(b, "model", windw=3), "damaged .model: unknown key windw, did you mean window"),
        ("config.json", lambda b: edited(b, model={"family": "dinn"}), "damaged .model: family 'dinn' is not allowed"),
        ("config.json", lambda b: edited(b, model={"family": "din"}), "parts are of different families, model_type is ctrsink"),
        ("config.json", lambda b: edited(b, facts={"vocabulary": "many"}), "damaged .facts: "),
        ("config.json", lambda b: within(b, "objective", kind="clik"), "damaged .objective: kind: 'clik' is not allowed"),
        ("config.json", lambda b: edited(b, base={"precision": "fp32"}), "damaged .base: "),
        ("config.json", lambda b: edited(b, family=None), "damaged .missing key family"),
        ("config.json", lambda b: edited(b, names=5), "damaged .names: "),
        ("config.json", lambda b: edited(b, names={"(": "x"}), "is damaged"),
    ):  # fmt: skip
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        for path in Path(model).iterdir():
            content = path.read_bytes()
            (folder / path.name).write_bytes(spoil(content) if path.name == name else content)
        assert (folder / name).read_bytes() != Path(model, name).read_bytes()
        with pytest.raises(InputError, match=message):
            Scorer.load(str(folder))


def test_request_of_names_an_event_that_is_not_there(data: Prepared) -> None:
    with pytest.raises(InputError, match="there is no event 99"):
        request_of(Dataset(data.uri), 0, 99)


@pytest.mark.parametrize("device", ["mps", "foo"])
def test_a_device_that_torch_cannot_use_is_refused(model: str, device: str) -> None:
    with pytest.raises(InputError, match=f"--device {device}: torch cannot use it"):
        Scorer.load(model, device)


def test_a_bf16_model_tells_the_nearest_behaviours_before_it_scored(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"), "bf16")
    assert len(Scorer.load(str(tmp_path / "out")).nearest(request_of(Dataset(data.uri), 0, 5, [0]), 0, 2)) == 2
