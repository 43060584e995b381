"""The scorer's three steps: what a request gets alone, together with others, behind a kept history, and from known items."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.prepare import tokenize
from ctrsink.sequences.collate import collate
from ctrsink.serve import Scorer, request_of
from tests.engine_fixtures import LASTING, READOUTS, Pool, exported
from tests.serving_fixtures import LLAMA, Prepared, prepared

GOLDEN = json.loads(Path("tests/golden/scores.json").read_text())
KINDS = [(examples, readout) for examples in ("per_target", "per_user") for readout in READOUTS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def pool(data: Prepared) -> Pool:
    return Pool.of(data)


@pytest.fixture(scope="module")
def folders(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    return {kind: exported(data, tmp_path_factory.mktemp("-".join(kind)), *kind) for kind in KINDS}


@pytest.fixture(scope="module")
def scorers(folders: dict[tuple[str, str], str]) -> dict[tuple[str, str], Scorer]:
    """They keep nothing of histories."""
    return {kind: Scorer.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def any_scorer(scorers: dict[tuple[str, str], Scorer]) -> Scorer:
    return scorers["per_target", "all-attend"]


def run(scorer: Scorer, *trees: dict[str, Any]) -> list[list[float]]:
    found = scorer.run([scorer.encode(scorer.parse(tree, "r"), "r") for tree in trees])
    assert not any(isinstance(one, InputError) for one in found)
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_request_alone_gets_what_the_scorer_gave_before_there_were_steps(
    data: Prepared, scorers: dict[tuple[str, str], Scorer], kind: tuple[str, str]
) -> None:
    """The values are those of the scorer that did all in one step; another processor rounds otherwise."""
    scorer, dataset = scorers[kind], Dataset(data.uri)
    asked = [request_of(dataset, u, e, list(range(n))) for u, e, n in ((0, 0, 2), (1, 3, 6), (2, 7, 5), (3, 6, 1))]
    asked.append(request_of(dataset, 2, 5, [i % 6 for i in range(128)]))
    for tree, expected in zip(asked, GOLDEN["-".join(kind)], strict=True):
        encoded = scorer.encode(scorer.parse(tree, "r"), "r")
        (found,) = scorer.run([encoded])
        assert not isinstance(found, InputError)
        np.testing.assert_allclose(found[:6], expected, atol=1e-6)
        # Bit for bit the model's own forward pass, whatever was scored before.
        batch = collate(encoded.sequences, np.array([0]), np.array([0]))
        with torch.inference_mode():
            assert found == scorer.model(batch).double().sigmoid().tolist()
        assert found == scorer.run([encoded])[0]


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_requests_share_batches_within_the_budget(
    pool: Pool, folders: dict[tuple[str, str], str], kind: tuple[str, str], tokens: int
) -> None:
    scorer = Scorer.load(folders[kind], tokens=tokens)
    trees = [pool.request([(i % 6, i % 5)] * (i % 5), [(i + j) % 6 for j in range(1 + i % 3)]) for i in range(6)]
    alone = [run(scorer, tree)[0] for tree in trees]
    sizes: list[tuple[int, int]] = []
    handle = scorer.model.register_forward_pre_hook(
        lambda module, args: sizes.append((args[0].tokens, len(args[0].axes["positions"].lengths)))
    )
    together = run(scorer, *trees)
    handle.remove()
    assert all(used <= tokens or sequences == 1 for used, sequences in sizes)
    assert sum(sequences for _, sequences in sizes) == len(trees)
    assert len(sizes) == {1: 6, 10**6: 1}.get(tokens, len(sizes))
    assert 1 < len(sizes) < 6 or tokens != 100
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_error_stands_in_the_place_of_its_request(any_scorer: Scorer, pool: Pool, folders: dict[Any, str]) -> None:
    scorer = Scorer.load(folders["per_target", "all-attend"], history_bytes=10**8)
    assert any_scorer.run([]) == scorer.run([]) == []
    good, bad = pool.request([(0, 1)], [1, 2], "good"), pool.request([(0, 1)], [1, 2, 3], "bad")
    expected = run(any_scorer, good)[0]
    weight = next(p for name, p in scorer.model.named_parameters() if name.endswith("embed_tokens.weight"))
    encoded = [scorer.encode(scorer.parse(tree, where), where) for tree, where in ((good, "one"), (bad, "two"))]
    known = set(encoded[0].sequences.columns["input_ids"].tolist())
    overflown = next(i for i in encoded[1].sequences.columns["input_ids"].tolist() if i not in known)
    with torch.no_grad():
        weight[overflown] = float("nan")
    found, error = scorer.run(encoded)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert isinstance(error, InputError)
    assert str(error).startswith("two: the model's probability of candidates.")
    # What overflowed is not kept.
    assert scorer.histories is not None
    assert len(scorer.histories) == 1


def test_a_request_that_is_too_long_for_the_model_stops_no_other(data: Prepared, pool: Pool, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backbone = {"config": LLAMA | {"rope_parameters": rope}}
    folder = exported(data, tmp_path, "per_target", "all-attend", model={"backbone": backbone})
    config = Path(folder, "config.json")
    config.write_text(config.read_text().replace('"max_position_embeddings": 1024', '"max_position_embeddings": 30'))
    for scorer in (Scorer.load(folder), Scorer.load(folder, history_bytes=10**7)):
        trees = [pool.request([(0, 1)] * count, [1], str(count)) for count in (1, 4, 0)]
        encoded = [scorer.encode(scorer.parse(tree, f"line {i}"), f"line {i}") for i, tree in enumerate(trees)]
        first, long, last = scorer.run(encoded)
        assert isinstance(long, InputError)
        assert str(long).startswith("line 1: model.backbone: llama has a rope_type dynamic")
        np.testing.assert_allclose([first, last], [as_before(scorer, trees[0]), as_before(scorer, trees[2])], atol=1e-6)


BEHAVIOUR = st.tuples(st.integers(0, 5), st.integers(0, 5))
STEP = st.one_of(
    st.tuples(st.just("grow"), st.lists(BEHAVIOUR, min_size=1, max_size=1)),
    st.tuples(st.just("grow"), st.lists(BEHAVIOUR, min_size=1, max_size=4)),
    st.tuples(st.just("change"), st.tuples(st.integers(0, 30), BEHAVIOUR)),
    st.tuples(st.just("cut"), st.integers(0, 30)),
    st.tuples(st.just("same"), st.none()),
)


MANY = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 300])


def as_before(scorer: Scorer, tree: dict[str, Any]) -> list[float]:
    """Sequence by sequence, each computed whole."""
    sequences = scorer.encode(scorer.parse(tree, "r"), "r").sequences
    with torch.inference_mode():
        batches = (collate(sequences, np.array([i]), np.array([0])) for i in range(len(sequences)))
        return [value for batch in batches for value in scorer.model(batch).double().sigmoid().tolist()]


def changed(history: list[tuple[int, int]], step: tuple[str, Any]) -> list[tuple[int, int]]:
    kind, what = step
    if kind == "grow":
        return history + what
    if kind == "change" and history:
        place = what[0] % len(history)
        return [*history[:place], what[1], *history[place + 1 :]]
    return history[what % (len(history) + 1) :] if kind == "cut" else history


@pytest.fixture(scope="module")
def narrow(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """The models with a window of two events and signals that last."""
    model = LASTING | {"window": 2}
    return {kind: exported(data, tmp_path_factory.mktemp("window"), *kind, model=model) for kind in KINDS[1:5]}


@pytest.fixture(scope="module")
def lasting(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose candidates see sinks alone, and whose histories can be continued."""
    return exported(data, tmp_path_factory.mktemp("lasting"), "per_target", "sinks-attend", model=LASTING)


@pytest.mark.parametrize(("kind", "window"), [*((kind, None) for kind in KINDS), *((kind, 2) for kind in KINDS[1:5])], ids=str)
def test_a_kept_history_changes_no_score(
    pool: Pool, folders: dict[Any, str], narrow: dict[Any, str], kind: tuple[str, str], window: int | None
) -> None:
    """Histories grow, change in the middle and lose their beginning; a sequence has room for four behaviours, or six."""
    of = folders if window is None else narrow
    scorers = [Scorer.load(of[kind], history_bytes=10**8)]
    if window or kind[1] == "sinks-attend":
        scorers.append(Scorer.load(of[kind], history_bytes=10**8, sinks_only=True))

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(BEHAVIOUR, max_size=9), st.lists(STEP, min_size=1, max_size=5), MANY)
    def check(history: list[tuple[int, int]], steps: list[tuple[str, Any]], candidates: int) -> None:
        for step in steps:
            tree = pool.request(history, [(7 * i) % 6 for i in range(candidates)])
            expected = as_before(scorers[0], tree)
            for scorer in scorers:
                np.testing.assert_allclose(run(scorer, tree)[0], expected, atol=1e-6)
            history = changed(history, step)

    check()
    for scorer in scorers:
        assert scorer.histories is not None
        assert scorer.histories.counts.hit > 0
        assert scorer.histories.counts.missed > 0
    assert scorers[0].histories is not None
    assert scorers[0].histories.counts.extended > 0


def test_what_is_kept_is_counted_and_bounded(pool: Pool, lasting: str) -> None:
    scorer = Scorer.load(lasting, history_bytes=10**8)
    kept = scorer.histories
    assert kept is not None
    assert scorer.caches is None
    long = [(i % 6, 3) for i in range(9)]
    computed: list[int] = []
    handle = scorer.model.ctr.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def counted(tree: dict[str, Any]) -> tuple[int, int, int]:
        run(scorer, tree)
        return kept.counts.hit, kept.counts.extended, kept.counts.missed

    assert counted(pool.request(long[:2], [1])) == (0, 0, 1)
    assert counted(pool.request(long[:2], [1])) == (1, 0, 1)
    assert counted(pool.request(long[:3], [1])) == (1, 1, 1)
    # The first behaviour is another one: nothing before it but an empty prefix.
    assert counted(pool.request([(5, 1), *long[1:3]], [1])) == (1, 1, 2)
    assert counted(pool.request(long[:2], [1], "other")) == (1, 1, 3)
    assert counted(pool.request(long[:2], [1]) | {"user": None}) == (1, 1, 4)
    handle.remove()
    alone = computed[1]  # the candidate's own text
    assert computed[0] > computed[2] > alone
    assert (
        kept.counts.known_tokens + kept.counts.computed_tokens == sum(computed) - len(computed) * alone + kept.counts.known_tokens
    )
    assert len(kept) == 2
    # The least recently used user goes first.
    room = kept.nbytes
    small = Scorer.load(lasting, history_bytes=room)
    assert small.histories is not None
    for user in ("a", "b", "a", "c"):
        run(small, pool.request(long[:2], [1], user))
        assert small.histories.nbytes <= room
    run(small, pool.request(long[:2], [1], "a"))
    assert small.histories.counts.hit == 2


def test_sinks_alone_take_less_and_serve_where_candidates_see_nothing_else(
    pool: Pool, lasting: str, folders: dict[Any, str]
) -> None:
    everything, sinks = (Scorer.load(lasting, history_bytes=10**8, sinks_only=only) for only in (False, True))
    tree = pool.request([(i % 6, 3) for i in range(4)], [1, 2, 3])
    assert everything.histories is not None
    assert sinks.histories is not None
    for _ in range(2):
        assert run(everything, tree) == run(sinks, tree)
    assert sinks.histories.counts.hit == 1
    assert sinks.histories.nbytes < everything.histories.nbytes / 2
    with pytest.raises(InputError, match=r"sinks_only: .* read texts of the history"):
        Scorer.load(folders["per_target", "all-attend"], history_bytes=10**8, sinks_only=True)
    with pytest.raises(InputError, match=r"sinks_only: .* no memory"):
        Scorer.load(lasting, sinks_only=True)


def test_kept_histories_of_a_bfloat16_model_stay_near(pool: Pool, folders: dict[Any, str], tmp_path: Path) -> None:
    export_run(str(Path(folders["per_user", "all-attend"]).parent / "run"), str(tmp_path / "half"), "bf16")
    scorer = Scorer.load(str(tmp_path / "half"), history_bytes=10**7)
    for count in (2, 3, 3):
        tree = pool.request([(i, 3) for i in range(count)], [1, 2, 3])
        np.testing.assert_allclose(run(scorer, tree)[0], as_before(scorer, tree), atol=0.02)
    assert scorer.histories is not None
    assert scorer.histories.counts.hit == 1


def test_a_history_is_computed_once_for_a_thousand_candidates(any_scorer: Scorer, pool: Pool) -> None:
    history = [(i % 6, 3) for i in range(4)]
    computed: list[int] = []
    handle = any_scorer.model.ctr.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tree = pool.request(history, [i % 6 for i in range(1000)])
    found = np.array(run(any_scorer, tree)[0])
    handle.remove()
    encoded = any_scorer.encode(any_scorer.parse(tree, "r"), "r")
    candidates = int(encoded.sequences.columns["candidate"].sum())
    assert (
        sum(computed) - candidates
        == len(encoded.sequences[0].columns["candidate"]) - encoded.sequences[0].columns["candidate"].sum()
    )
    apart = run(any_scorer, pool.request(history, list(range(6))))[0]
    np.testing.assert_allclose(found, [apart[i % 6] for i in range(1000)], atol=1e-6)
    # One user's requests of one moment share it, too.
    kept = Scorer.load(str(any_scorer.model.name_or_path), history_bytes=10**7)
    trees = [pool.request(history, [i % 6]) for i in range(5)]
    assert np.ravel(run(kept, *trees)).tolist() == pytest.approx(apart[:5], abs=1e-6)
    assert kept.histories is not None
    assert kept.histories.counts.missed == 1


def test_why_nothing_is_kept_is_told(data: Prepared, any_scorer: Scorer, tmp_path: Path) -> None:
    assert any_scorer.caches == "no memory is given for histories (history_bytes)"
    published = {"bias": {"layers": 1.0, "causal": False}}
    folder = exported(data, tmp_path, "per_target", "all-attend", model=published)
    scorer = Scorer.load(folder, history_bytes=10**8)
    assert scorer.caches is not None
    assert "model.bias.causal" in scorer.caches
    assert scorer.histories is None
    tree = request_of(Dataset(data.uri), 1, 5, [0, 1, 2])
    assert run(scorer, tree) == [scorer.score(tree)]


def test_known_items_are_not_tokenised_again(
    any_scorer: Scorer, pool: Pool, folders: dict[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    encode = tokenize.encode
    monkeypatch.setattr(tokenize, "encode", lambda of, more, **options: texts.extend(more) or encode(of, more, **options))
    scorer = Scorer.load(folders["per_target", "all-attend"], items=4)
    tree = pool.request([(0, 1), (1, 2), (0, 3)], [1, 2])
    texts.clear()
    first = run(scorer, tree)
    assert len(texts) == 3
    assert run(scorer, tree) == first == run(any_scorer, tree)
    assert len(texts) in (3, 6)  # the other scorer may know them or not
    texts.clear()
    # What the template shows of an item decides, not who it is; what it does not show changes nothing.
    tree["candidates"][0] |= {"title": "Another", "unused": 7}
    tree["candidates"][1] |= {"unused": 7}
    other = run(scorer, tree)[0]
    assert len(texts) == 1
    assert other[0] != first[0][0]
    assert other[1] == pytest.approx(first[0][1], abs=1e-6)
    # Least recently used out first.
    run(scorer, pool.request([], [3, 4, 5]))
    texts.clear()
    run(scorer, pool.request([], [0]))
    assert len(texts) == 1


def test_threads_encode_while_one_runs(any_scorer: Scorer, pool: Pool, folders: dict[Any, str]) -> None:
    scorer = Scorer.load(folders["per_user", "all-attend"], items=2, history_bytes=10**6)
    trees = [pool.request([(i % 6, j % 5) for j in range(i % 5)], [i % 6, (i + 1) % 6], f"user {i % 3}") for i in range(40)]
    expected = [as_before(scorer, tree) for tree in trees]
    with ThreadPoolExecutor(4) as threads:
        for found, right in zip(
            threads.map(lambda tree: scorer.encode(scorer.parse(tree, "r"), "r"), trees), expected, strict=True
        ):
            np.testing.assert_allclose(scorer.run([found])[0], right, atol=1e-6)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_request_that_is_run_again_after_an_error_is_counted_once(
    pool: Pool, lasting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(lasting, history_bytes=2**30)
    recall = scorer.model.recall

    def alone_only(batch: Any, histories: Any, of: Any) -> Any:
        if len(histories) > 1:
            raise InputError("too long")
        return recall(batch, histories, of)

    monkeypatch.setattr(scorer.model, "recall", alone_only)
    run(scorer, *(pool.request([(0, 1)], [1, 2], user) for user in "ab"))
    assert scorer.histories is not None
    assert scorer.histories.counts.missed == 2
