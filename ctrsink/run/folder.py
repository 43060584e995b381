"""The run's folder: whose it is, and what may differ when a run is continued."""

import json
from contextlib import suppress
from typing import Any

from ctrsink import kept, storage, strict_json
from ctrsink.config import RunSpec, dump_run, parse_run
from ctrsink.config.tree import read_yaml
from ctrsink.dataset.manifest import Manifest
from ctrsink.errors import InputError, RunError
from ctrsink.run.listing import list_checkpoints

CONFIG_NAME = "config.yaml"
RESULT_NAME = "result.json"
DATA_NAME = "data.sha256"  # identity of the data set, see Manifest.identity
METRICS_NAME = "metrics.jsonl"
BOARD_NAME = "tensorboard"
MLFLOW_NAME = "mlflow.run"  # id of the run in MLflow
RAY_NAME = "ray"  # what Ray Train writes of its own
FAILURES_NAME = "failures"  # the last failure of each rank, and how often it came back
FLIGHT_NAME = "flight"  # the last collectives of each rank of a run that failed, see ctrsink.runtime.flight
PRESENCE_NAME = "held-by.json"  # who trains the run at this moment, see ctrsink.run.presence
STOP_NAME = "stop-requested"  # by `ctrsink stop` or a signal; holds the reason
# What may change between a run and its continuation: where it runs and how often it reports, not what it computes.
_FREE = (
    "name", "run_dir", "prepare", "runtime", "evaluate", "data.uri", "data.cache", "data.workers", "model.attention",
    "model.gradient_checkpointing", "train.checkpoint_every", "train.checkpoint_format", "train.keep", "train.log_every",
    "train.micro_batch_size", "train.micro_batch_tokens", "train.memory_gib", "train.mlflow", "train.zero_stage", "train.offload",
    "train.on_nonfinite",
)  # fmt: skip


def identities(spec: RunSpec, manifest: Manifest) -> tuple[str, ...]:
    """What the data set of a run may have been when it trained, the present one last: in one pass over its parts, also fewer."""
    return manifest.identities if spec.data.order == "chronological" else (manifest.identity,)


def claim(spec: RunSpec, resume: bool, datasets: tuple[str, ...]) -> bool:
    """Make `spec.run_dir` the folder of this run, by its config.yaml; returns whether the run is new there.

    Of several runs that start there at the same moment, one is new.

    Args:
        datasets: see `identities`.

    Raises:
        InputError: it holds a run and `resume` is false, or the run there computes something else, or on other data.
    """
    path = storage.join(spec.run_dir, CONFIG_NAME)
    new = storage.create(path, dump_run(spec).encode())
    if not new:
        if not resume:
            raise InputError(_taken(spec.run_dir))
        require_same(spec, datasets)
        storage.write_bytes(path, dump_run(spec).encode())
    try:
        withdraw_stop(spec.run_dir)
        storage.write_bytes(storage.join(spec.run_dir, DATA_NAME), datasets[-1].encode())
    except BaseException:
        with suppress(InputError, RunError, OSError):
            if new:
                release(spec.run_dir)
        raise
    return new


def require_same(spec: RunSpec, datasets: tuple[str, ...]) -> None:
    """Raise InputError where the run in `spec.run_dir` computes something else, or on other data; see `claim`."""
    difference = first_difference(read_run(spec.run_dir), spec)
    if difference is not None:
        raise InputError(f"{spec.run_dir} belongs to another configuration: {difference}; choose another run_dir")
    if claimed_data(spec.run_dir) not in (None, *datasets):
        raise InputError(
            f"{spec.run_dir} was trained on another data set than the one now in {spec.data.uri}: "
            "give the old one back, or choose another run_dir"
        )


def require_new(run_dir: str) -> None:
    """Raise InputError where the folder holds a run already."""
    if storage.exists(storage.join(run_dir, CONFIG_NAME)):
        raise InputError(_taken(run_dir))


def _taken(run_dir: str) -> str:
    return f"{run_dir} already holds a run: give --resume to continue it, or choose another run_dir"


def claimed_data(run_dir: str) -> str | None:
    """Identity of the data set that the run was claimed for; None where the claim was cut off before it said so."""
    try:
        return storage.read_bytes(storage.join(run_dir, DATA_NAME)).decode()
    except FileNotFoundError:
        return None


def release(run_dir: str) -> None:
    """Take back the claim of a run that ended before its first step; one that has trained can be continued."""
    if storage.exists(storage.join(run_dir, METRICS_NAME)) or list_checkpoints(run_dir):
        return
    for name in (CONFIG_NAME, DATA_NAME, BOARD_NAME, MLFLOW_NAME, RAY_NAME, STOP_NAME, FAILURES_NAME, FLIGHT_NAME, RESULT_NAME):
        storage.delete(storage.join(run_dir, name))
    if set(storage.list_files(run_dir)) <= {PRESENCE_NAME} and not storage.list_dirs(run_dir):
        storage.delete(run_dir)


def read_run(run_dir: str) -> RunSpec:
    """The configuration of the run in `run_dir`.

    Raises:
        InputError: there is none.
    """
    path = storage.join(run_dir, CONFIG_NAME)
    try:
        return parse_run(read_yaml(storage.read_bytes(path), path), path)
    except FileNotFoundError:
        raise InputError(f"{run_dir} holds no run: there is no {CONFIG_NAME}; give the run_dir of `ctrsink train`") from None


def request_stop(run_dir: str, reason: str) -> None:
    """Ask the processes that train the run, wherever they are, to save it and stop."""
    storage.write_bytes(storage.join(run_dir, STOP_NAME), reason.encode())


def withdraw_stop(run_dir: str) -> None:
    """Nobody is asked to stop any more."""
    storage.delete(storage.join(run_dir, STOP_NAME))


def stop_request(run_dir: str) -> str | None:
    """The reason why somebody asked the run to stop since it was started, or None."""
    try:
        return storage.read_bytes(storage.join(run_dir, STOP_NAME)).decode()
    except FileNotFoundError:
        return None


def write_result(run_dir: str, result: dict[str, Any]) -> None:
    """Leave what a training process found for whoever started it."""
    storage.write_bytes(storage.join(run_dir, RESULT_NAME), strict_json.dumps(kept.stamped(result), indent=1).encode())


def read_result(run_dir: str) -> dict[str, Any]:
    """What the last training process of the run left, see Trainer.run.

    Raises:
        FileNotFoundError: none has ended.
        InputError: the file is damaged, or a newer version's.
    """
    path = storage.join(run_dir, RESULT_NAME)
    try:
        return kept.opened(json.loads(storage.read_bytes(path)), path)
    except ValueError:
        raise InputError(f"{path} is damaged: resume the run to write it again") from None


def first_difference(old: RunSpec, new: RunSpec) -> str | None:
    """The first key on which two configurations compute differently, as `key was a, is b`."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        free = any(key == f or key.startswith(f + ".") for f in _FREE)
        if not free and before.get(key) != after.get(key):
            return f"{key} was {before.get(key)}, is {after.get(key)}"
    return None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; an entry of a list of sections counts from 0, as in `stages.0.lr.head`."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out
