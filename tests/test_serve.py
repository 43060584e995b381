"""A service as one process: it scores as `ctrsink score` does, refuses what is malformed, and one client cannot hurt another."""

import concurrent.futures
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrsink import strict_json
from ctrsink.config.serve import ServeSpec
from ctrsink.serve.model import Model
from tests.command_line import call, refused
from tests.mutator import mutated_bytes, mutated_tree
from tests.serve_fixtures import TOKEN, Exported, Serving

SECRET = "a-token-of-more-than-16-characters"


@pytest.fixture(scope="module")
def service(served: Exported) -> Iterator[Serving]:
    limits = ["limits.body_seconds=2", "limits.candidates=50", "limits.text=500", "queue.requests=12"]
    with Serving("--model", served.models[0], *limits) as running:
        yield running


def test_scores_equal_those_of_the_command_line(service: Serving, served: Exported, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in served.requests))
    assert (
        call("score", "--model", served.models[0], "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl").code == 0
    )
    expected = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [service.score(request).json for request in served.requests]
    for row, alone in zip(found, expected, strict=True):  # behind a history that is kept
        assert row["probabilities"] == pytest.approx(alone, abs=1e-6)
    assert {row["model"] for row in found} == {found[0]["model"]}
    assert found[0]["model"].startswith("a@")
    # Together with others in one batch.
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda request: service.score(request).json["probabilities"], served.requests))
    for row, alone in zip(together, expected, strict=True):
        assert row == pytest.approx(alone, abs=1e-6)


def test_an_answer_has_the_id_of_its_request_or_one_of_its_own(service: Serving, served: Exported) -> None:
    assert service.score({**served.requests[0], "id": [1, "a"]}).json["id"] == [1, "a"]
    first, second = (service.score(served.requests[0]).json["id"] for _ in range(2))
    assert first != second


def test_the_schema_tells_what_a_request_is(service: Serving) -> None:
    schema = service.get("/openapi.json").json
    post = schema["paths"]["/v1/score"]["post"]
    assert set(post["requestBody"]["content"]["application/json"]["schema"]["properties"]) >= {
        "history",
        "candidates",
        "timestamp",
    }
    assert {"200", "400", "408", "413", "422", "503"} <= set(post["responses"])
    assert {"/health/live", "/health/ready", "/metrics"} <= set(schema["paths"])


def test_200_mutated_requests_are_answered_or_refused_in_one_sentence(service: Serving, served: Exported) -> None:
    """What the mutator spoils is often still a request, so it goes on until 200 were refused."""
    tree, refusals, answers = served.requests[0], 0, 0
    for number in range(2000):
        chance = random.Random(f"serve {number}")
        as_tree = chance.random() < 0.6
        spoilt = json.dumps(mutated_tree(chance, tree) if as_tree else tree).encode()
        spoilt = spoilt if as_tree else mutated_bytes(chance, spoilt)
        reply = service.score(spoilt)
        if reply.status == 200:
            answers += 1
            assert all(0 < value < 1 for value in reply.json["probabilities"])
            continue
        refusals += 1
        assert 400 <= reply.status < 500, (spoilt, reply)
        assert set(reply.json) == {"error"}
        assert "\n" not in reply.json["error"].strip()
        assert 10 < len(reply.json["error"]) < 1500
        if refusals == 200:
            break
    assert refusals == 200
    assert answers > 0
    assert service.score(tree).status == 200
    assert not [line for line in service.lines if "Traceback" in line]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, b"", "not a JSON"),
        (400, b"[" * 100_000, "not a JSON"),
        (400, b'{"timestamp": 1, "timestamp": 2}', "twice"),
        (422, b"[]", "mapping of keys"),
        (422, b'{"candidates": [' + b", ".join([b"{}"] * 51) + b'], "timestamp": 1}', "51 entries are more than the 50"),
        (422, json.dumps({"candidates": [{"title": "x" * 501}], "timestamp": 1}).encode(), "longer than 500"),
        (413, b" " * (4 * 2**20 + 1), "more than 4194304 bytes"),
    ],
    ids=["empty", "deep", "twice", "list", "candidates", "text", "body"],
)
def test_what_is_beyond_the_limits_is_refused(service: Serving, status: int, body: bytes, words: str) -> None:
    reply = service.score(body)
    assert reply.status == status
    assert words in reply.json["error"]


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "1e9"])
def test_a_deadline_is_a_number_of_milliseconds(service: Serving, served: Exported, value: str) -> None:
    reply = service.score(served.requests[0], X_Deadline_Ms=value)
    assert reply.status == 400
    assert "X-Deadline-Ms" in reply.json["error"]


def test_work_whose_deadline_has_passed_is_not_done(service: Serving, served: Exported) -> None:
    before = service.metric("shed_total")
    reply = service.score(served.requests[0], X_Deadline_Ms="0.001")
    assert (reply.status, int(reply.headers["retry-after"]) >= 1) == (503, True)
    assert "deadline" in reply.json["error"]
    assert service.metric("shed_total")['{cause="deadline"}'] == before['{cause="deadline"}'] + 1


def test_three_times_too_much_is_answered_with_503_alone(service: Serving, served: Exported) -> None:
    with concurrent.futures.ThreadPoolExecutor(36) as clients:
        replies = list(clients.map(service.score, served.requests * 8))
    assert {reply.status for reply in replies} == {200, 503}
    for reply in replies:
        if reply.status == 503:
            assert int(reply.headers["retry-after"]) >= 1
            assert "12 requests wait already" in reply.json["error"]
        else:
            assert len(reply.json["probabilities"]) == 4
    assert service.metric("waiting_requests") == service.metric("waiting_tokens") == {"": 0.0}
    assert service.metric("shed_total")['{cause="full"}'] >= 1


def test_a_slow_client_stalls_nobody_and_is_let_go(service: Serving, served: Exported) -> None:
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
    start = time.monotonic()
    assert [service.score(request).status for request in served.requests[:5]] == [200] * 5
    assert service.metric("waiting_requests") == {"": 0.0}
    while time.monotonic() < start + 4:
        for connection in slow:
            connection.sendall(b" ") if time.monotonic() < start + 1.5 else None
        time.sleep(0.5)
    for connection in slow:
        connection.settimeout(30)
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 2 s" in answer
        connection.close()


def test_the_work_of_a_client_that_has_gone_is_dropped(service: Serving, served: Exported) -> None:
    before = service.metric("shed_total")['{cause="gone"}']
    body = json.dumps(served.requests[0]).encode()
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    deadline = time.monotonic() + 30
    while service.metric("shed_total")['{cause="gone"}'] == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert service.metric("shed_total")['{cause="gone"}'] > before
    assert service.metric("waiting_requests") == {"": 0.0}


def test_metrics_are_by_version_and_phase_and_name_no_user(service: Serving, served: Exported) -> None:
    version = service.score({**served.requests[0], "user": "somebody-in-particular"}).json["model"]
    page = service.get("/metrics").body.decode()
    for phase in ("encode", "queue", "model", "whole"):
        assert f'phase_seconds_count{{phase="{phase}",version="{version}"}}' in page
    assert f'ctrsink_serve_model{{version="{version}"}} 1.0' in page
    assert f'batch_tokens_count{{version="{version}"}}' in page
    assert "somebody" not in page


def test_a_history_that_is_kept_is_found_again(service: Serving, served: Exported) -> None:
    tree = {**served.requests[3], "user": "comes again"}
    version = service.score(tree).json["model"]
    before = service.metric("histories_total")
    again = service.score(tree).json["probabilities"]
    assert again == pytest.approx(service.score({**tree, "user": None}).json["probabilities"], abs=1e-6)
    hit = f'{{outcome="hit",version="{version}"}}'
    assert service.metric("histories_total")[hit] == before[hit] + 1
    assert service.metric("kept_bytes")[f'{{kind="histories",version="{version}"}}'] > 0


@pytest.fixture(scope="module")
def guarded(served: Exported) -> Iterator[Serving]:
    with Serving("--model", served.models[1], "drain_seconds=4", **{TOKEN: SECRET}) as running:
        yield running


def test_a_token_is_asked_for(guarded: Serving, served: Exported) -> None:
    tree = served.requests[0]
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}, {"Authorization": f"Bearer {SECRET}x"}):
        reply = guarded.score(tree, **given)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert SECRET not in reply.body.decode()
    assert guarded.get("/metrics").status == 401
    assert guarded.get("/health/ready").status == 200
    assert guarded.score(tree, Authorization=f"Bearer {SECRET}").status == 200


def test_sigterm_says_not_ready_answers_what_was_accepted_and_ends_well(guarded: Serving, served: Exported) -> None:
    many = [*served.requests, *served.requests]
    headers = {"Authorization": f"Bearer {SECRET}", "X_Deadline_Ms": "60000"}
    with concurrent.futures.ThreadPoolExecutor(20) as clients:
        answers = [clients.submit(guarded.score, request, **headers) for request in many]
        concurrent.futures.wait(answers, return_when=concurrent.futures.FIRST_COMPLETED)
        guarded.process.terminate()
        guarded.told("asked to end")
        assert guarded.get("/health/ready").json["reason"] == "the service is about to end"
        assert guarded.get("/health/live").status == 200
        assert [answer.result().status for answer in answers] == [200] * len(many)
    assert guarded.process.wait(60) == 0
    assert not [line for line in guarded.lines if SECRET in line]


def test_what_cannot_be_served_is_refused_in_one_line(served: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    model = served.models[0]
    refused(call("serve", "--plain", "--model", tmp_path / "none"), "none", "is no pointer")
    (tmp_path / "current").write_text("\n")
    refused(call("serve", "--plain", "--model", tmp_path / "current"), "current does not name a model")
    refused(call("serve", "--plain", "--model", model, "--host", "0.0.0.0"), "--host 0.0.0.0", TOKEN, "--allow-unauthenticated")
    refused(call("serve", "--plain", "--model", model, "--replicas", "2"), "--plain is one process")
    refused(call("serve", "--plain", "--model", model, "--log-share", "0.5"), "--log-requests")
    refused(call("serve", "--plain", "--model", model, "queue.request=3"), "queue.request", "did you mean requests")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(call("serve", "--plain", "--model", model, "--port", port), f"port {port}")
    monkeypatch.setenv(TOKEN, "short")
    refused(call("serve", "--plain", "--model", model), TOKEN, "16 printable")


def test_an_example_of_each_model_is_a_request(served: Exported) -> None:
    model = Model.load(served.models[1], ServeSpec(model=served.models[1]))
    tree = strict_json.dumps(model.example(2, 3))
    (scores,) = model.run([model.encode(model.parse(json.loads(tree)))])
    assert len(scores) == 3 if isinstance(scores, list) else False
