"""Ray Train: the same loop on `runtime.workers` workers of a Ray cluster, placed, watched and started again by Ray."""

import logging
import math
import os
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ctrsink import logs, storage
from ctrsink.config import RunSpec, parse_run
from ctrsink.config.train import RuntimeSpec
from ctrsink.errors import Diverged, InputError, PeerLost, RunError, first_line
from ctrsink.evaluate.prediction_file import read_metrics_of
from ctrsink.families.facts import Facts
from ctrsink.run import repeats
from ctrsink.run.folder import RAY_NAME, read_result, request_stop, write_result
from ctrsink.run.listing import Step
from ctrsink.runtime import flight
from ctrsink.runtime.gauges import RayGauges
from ctrsink.runtime.places import told_of_waiting
from ctrsink.runtime.reach import cluster_address
from ctrsink.runtime.stopping import on_sigterm

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
PLACE_S = 15.0  # placing workers where there is room takes far less
log = logging.getLogger("ctrsink.train")


def connect(address: str | None, cpus: int) -> None:
    """Join the cluster at `address` or the one that a Ray job runs in; else start one here, on loopback, with `cpus` CPUs.

    Raises:
        InputError: the cluster cannot be reached, or none can be started here.
    """
    if ray.is_initialized():
        return
    named = "runtime.address" if address else "RAY_ADDRESS"
    address = cluster_address(address)
    try:
        if address:
            ray.init(address=address, log_to_driver=True)
        else:
            ray.init(
                address="local",  # not a cluster of somebody else's on this machine
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=True,
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:  # of no type of its own where a part of Ray does not start in time
        if address:
            raise InputError(f"{named} {address}: cannot join the Ray cluster ({first_line(error)})") from None
        hint = "see whether RAY_TMPDIR is a short path on a disk with room"
        raise InputError(f"cannot start a Ray cluster on this machine ({first_line(error)}): {hint}") from None


def train_ray(spec: RunSpec, facts: Facts, stop_after: int | None = None) -> dict[str, Any]:
    """Train on Ray workers; see Trainer.run for what comes back.

    A worker that dies takes its group with it; Ray starts the group again up to `runtime.max_failures` times, and it goes on from
    the run's latest checkpoint.

    Raises:
        InputError: a worker found the input to be at fault.
        RunError: training failed.
    """
    asking = on_sigterm(lambda reason: threading.Thread(target=_ask, args=(spec.run_dir, reason)).start())
    repeats.forget(spec.run_dir)
    _on_workers(spec, facts, {"stop_after": stop_after}, spec.runtime.max_failures, asking)
    result = read_result(spec.run_dir)
    if "given_up" in result:
        raise RunError(result["given_up"])
    return result


def evaluate_ray(spec: RunSpec, facts: Facts, step: Step) -> dict[str, dict[str, float | None]]:
    """Measure the run's checkpoint on Ray workers; metrics by split, as they stand in the run's folder.

    Workers that fail are not started again: nothing of a split is kept before all of it is measured.

    Raises:
        InputError: a worker found the input to be at fault.
        RunError: a worker failed.
    """
    flight.take(flight.place_of(spec.run_dir))  # of a failure of the training, which nothing here is about
    _on_workers(spec, facts, {"step": step}, 0, nullcontext())
    return {split: read_metrics_of(spec.run_dir, split) for split in spec.evaluate.splits}


def _on_workers(
    spec: RunSpec, facts: Facts, work: dict[str, Any], failures: int, meanwhile: AbstractContextManager[None]
) -> None:
    """Run `_worker` on all workers to its end; they may be started again after so many failures.

    Args:
        meanwhile: what is to hold while they work, entered behind Ray's start, which sets signal handlers of its own.
    """
    elsewhere = spec.runtime.address or os.environ.get("RAY_ADDRESS")
    if elsewhere and not storage.is_remote(spec.run_dir) and not Path(spec.run_dir).is_absolute():
        raise InputError(
            f"run_dir {spec.run_dir} is relative, which means nothing on a cluster: use s3://, or an absolute shared folder"
        )
    log.info("starting %s workers on Ray", spec.runtime.workers if _fixed(spec.runtime) else "elastic")
    connect(spec.runtime.address, _local_cpus(spec))
    spec = _without_working_folder(spec)
    runtime = spec.runtime
    place_s, tries = placing(runtime)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(place_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(runtime.collective_timeout_s)
    gpu = runtime.device == "cuda"
    place = flight.place_of(spec.run_dir)
    filesystem, path = storage.arrow_filesystem(storage.join(spec.run_dir, RAY_NAME))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "facts": asdict(facts),
            "work": work,
            "log_format": logs.of_workers(),
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=math.ceil(runtime.collective_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=runtime.workers if isinstance(runtime.workers, int) else (runtime.workers.min, runtime.workers.max),
            elastic_resize_monitor_interval_s=runtime.resize_every_s,
            use_gpu=gpu,
            resources_per_worker={"CPU": runtime.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            # A name of its own: Ray would take an earlier run of the same name up again. Resuming is ours, from the checkpoint.
            name=f"{spec.name}-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=filesystem,
            worker_runtime_env={"env_vars": flight.recording(place)},  # read when Ray makes the process group
            failure_config=FailureConfig(
                max_failures=failures,
                max_preemption_failures=runtime.max_preemptions,
                controller_failure_limit=tries,
            ),
        ),
    )
    try:
        with meanwhile, told_of_waiting(runtime), _watched(bool(elsewhere) or len(ray.nodes()) > 1):
            trainer.fit()
    except TrainingFailedError as error:
        raise _translate(error, place, runtime) from error


@contextmanager
def _watched(several: bool) -> Generator[None, None, None]:
    """No part of one machine alone is taken away: a watcher for that would only start anew with each start of the workers."""
    if several or WATCHER in os.environ:
        yield
        return
    os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[WATCHER]


def placing(runtime: RuntimeSpec) -> tuple[float, int]:
    """Seconds that Ray waits for the workers' places, and how often it may try again (-1: without end).

    Right after a node was lost Ray believes it alive, and asks for places there. Elastic workers then do with less: they try
    again soon, until `start_timeout_s` is over in all.
    """
    if runtime.max_failures == 0 and isinstance(runtime.workers, int):
        return runtime.start_timeout_s, 0
    place_s = runtime.start_timeout_s if isinstance(runtime.workers, int) else min(PLACE_S, runtime.start_timeout_s)
    return place_s, runtime.max_failures if runtime.max_failures < 0 else math.ceil(runtime.start_timeout_s / PLACE_S)


def _worker(config: dict[str, Any]) -> None:
    """What runs in each Ray worker."""
    from ctrsink.runtime.process import prepare_process

    os.environ[logs.FORMAT_VARIABLE] = config["log_format"]
    spec = parse_run(config["spec"], "the submitted configuration")
    context = get_context()
    prepare_process(spec.runtime.device, spec.runtime.cpus_per_worker, context.get_world_rank(), spec.runtime.deterministic)
    from ctrsink.dist import Topology
    from ctrsink.runtime.stalls import BEFORE, Stalls
    from ctrsink.runtime.stopping import StopRequests
    from ctrsink.train.host_hooks import HostHooks
    from ctrsink.train.loop import Trainer

    device = str(get_device()) if spec.runtime.device == "cuda" else "cpu"
    topology = Topology(context.get_world_rank(), context.get_world_size(), device)
    if "step" in config["work"]:
        from ctrsink.train.measure_together import evaluate_together

        evaluate_together(spec, topology, Facts(**config["facts"]), config["work"]["step"])
        return
    requests = StopRequests(spec.run_dir) if topology.is_first else None
    stalls = Stalls(BEFORE)
    stop = requests.reason if requests else lambda: None
    hooks = HostHooks(stop, _preemption, stalls.doing, RayGauges(spec.name))
    try:
        # Every rank reads the same, since all of those before have ended; a failure would make Ray try again.
        if (failure := repeats.given_up(spec.run_dir)) is not None:
            raise Diverged(failure)
        if topology.is_first and (told := flight.take(flight.place_of(spec.run_dir), _fixed(spec.runtime))) is not None:
            log.warning("before the workers were started again, %s", told)
        Trainer(spec, topology, Facts(**config["facts"]), hooks).run(config["work"]["stop_after"])
    except Diverged as error:  # on every rank
        if topology.is_first:
            write_result(spec.run_dir, {"given_up": str(error)})
    except Exception as error:
        flight.leave(topology.rank)
        if isinstance(error, InputError | RunError):
            repeats.record(spec.run_dir, topology.rank, error)
        raise
    finally:
        stalls.close()
        if requests:
            requests.close()


def _ask(run_dir: str, reason: str) -> None:
    try:
        request_stop(run_dir, reason)
    except (InputError, RunError, OSError) as error:
        log.error("the run cannot be asked to save and stop: %s", error)


def _preemption() -> str | None:
    info = get_preemption_info()
    if info is None:
        return None
    return f"the loss of the nodes {', '.join(info.preempted_node_ids)} (ranks {info.preempted_ranks}) is announced"


def _without_working_folder(spec: RunSpec) -> RunSpec:
    """Ray's workers run in folders of their own: local paths become absolute."""
    return spec.model_copy(
        update={
            "run_dir": storage.absolute(spec.run_dir),
            "data": spec.data.model_copy(update={"uri": storage.absolute(spec.data.uri)}),
            "model": spec.model.absolute(),
        }
    )


def _translate(error: TrainingFailedError, place: Path, runtime: RuntimeSpec) -> InputError | RunError:
    """The first worker's own error, with its rank, as one line."""
    if not isinstance(error, WorkerGroupError):
        return RunError(f"Ray Train failed: {str(error).strip().splitlines()[-1]}")
    failures = error.worker_failures.items()
    return told_of(
        {rank: getattr(f, "cause", None) or getattr(f, "_base_exc", None) or f for rank, f in failures}, place, runtime
    )


def told_of(causes: dict[int, BaseException], place: Path, runtime: RuntimeSpec) -> InputError | RunError:
    """The failures of some workers as that of one; where none tells its own, also for whom collectives waited, by `place`."""
    # A rank that lost its neighbour says so too: what names the trouble comes first.
    rank, cause = min(
        causes.items(),
        key=lambda item: (
            isinstance(item[1], PeerLost),
            not isinstance(item[1], InputError),
            not isinstance(item[1], RunError),
            item[0],
        ),
    )
    if isinstance(cause, InputError):
        return InputError(str(cause))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    waited_for = flight.take(place, _fixed(runtime)) if isinstance(cause, PeerLost) or not isinstance(cause, RunError) else None
    told = f"; {waited_for}" if waited_for else ""
    # Behind this line Ray says at length what can be done, and who uses the memory.
    memory = next((line.strip() for line in lines if "running low on memory" in line), None)
    line = memory or (lines[-1] if lines else str(cause))
    return RunError(f"worker {rank} failed: {type(cause).__name__}: {line}{told}")


def _fixed(runtime: RuntimeSpec) -> int | None:
    """Number of workers; None where it is elastic."""
    return runtime.workers if isinstance(runtime.workers, int) else None


def _local_cpus(spec: RunSpec) -> int:
    """CPUs to declare for a cluster of our own: what the workers ask for, and one for Ray Train's controller."""
    return spec.runtime.most_workers * spec.runtime.cpus_per_worker + 1
