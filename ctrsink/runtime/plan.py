"""Plan a run, on the machines that it is meant for, without them."""

from collections.abc import Sequence
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.errors import InputError
from ctrsink.runtime.preflight import check


def plan_run(
    spec: RunSpec,
    gpu: str | None,
    nodes: int = 1,
    per_node: int | None = None,
    utilisation: float = 0.35,
    network_gbit: float = 400.0,
    price: float | None = None,
    sweep: Sequence[int] = (),
) -> dict[str, Any]:
    """What the run takes, see Planner.told; with `sweep` a row for each number of nodes, too.

    Args:
        gpu: name of `devices.GPUS`; None: what the configuration's workers compute on, where that is the CPU of this machine.
        per_node: devices of a node; None: as many as leave `runtime.workers` in all.

    Raises:
        InputError: see preflight.check; or the device is not known, or the batch is too small for so many workers.
    """
    if gpu is None and spec.runtime.device == "cuda":
        raise InputError("runtime.device cuda: say which with --gpu")
    facts = check(spec)
    from ctrsink.estimate.plan import Place, Planner  # imports torch: what is refused above is refused at once
    from ctrsink.train.observe.hardware import has_bf16

    if spec.train.precision == "auto":
        precision = "bf16" if gpu is not None or has_bf16("cpu") else "fp32"
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"precision": precision})})
    each = per_node or max(1, spec.runtime.most_workers // nodes)
    device = _device(gpu, spec, each)

    def place(count: int) -> Place:
        return Place(device, gpu or "cpu", count, each, utilisation, network_gbit * 1e9 / 8, price, gpu is not None)

    planner = Planner(spec, facts)
    found = planner.told(place(nodes))
    if sweep:
        found["sweep"] = [_row(planner, place(count)) for count in sweep]
    return found


def _device(gpu: str | None, spec: RunSpec, each: int) -> Any:
    import psutil

    from ctrsink.estimate.devices import GPUS, Device

    if gpu is not None:
        return GPUS[gpu]
    peak = spec.runtime.peak_tflops * 1e12 if spec.runtime.peak_tflops else None
    return Device(psutil.virtual_memory().total / each, peak, peak)


def _row(planner: Any, place: Any) -> dict[str, Any]:
    """Of all stages together, which are taken to last an epoch each."""
    try:
        stages = planner.told(place)["stages"]
    except InputError as error:  # the other rows stand all the same
        return {"nodes": place.nodes, "devices": place.world, "error": str(error)}
    row = {"nodes": place.nodes, "devices": place.world, "peak": max(stage["micro_batch"]["peak"] for stage in stages)}
    if all("epoch" in stage for stage in stages):
        hours = sum(stage["epoch"]["hours"] for stage in stages)
        row |= {"hours": hours, "impressions_per_s": len(stages) * planner.impressions / (hours * 3600)}
        if place.price is not None:
            row["cost"] = sum(stage["epoch"]["cost"] for stage in stages)
    return row | {"limited_by": stages[-1]["limited_by"].split(":")[0]}
