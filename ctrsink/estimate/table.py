"""A plan as tables for people."""

from typing import Any

from ctrsink.text_table import aligned

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3))


def as_table(plan: dict[str, Any]) -> str:
    """The plan of `Planner.told`, and its sweep where it has one."""
    data = plan["data"]
    counts = f"{short(data['impressions'])} impressions in {short(data['sequences'])} sequences"
    lines = [
        f"{plan['nodes']} x {plan['per_node']} {plan['device']}, {plan['precision']}, ZeRO {plan['zero_stage']}; "
        f"{counts} of {data['tokens_per_sequence']:.1f} tokens"
    ]
    for stage in plan["stages"]:
        lines += ["", *_stage(stage, plan["zero_stage"])]
    if "sweep" in plan:
        lines += ["", _sweep(plan["sweep"])]
    return "\n".join(lines)


def _stage(stage: dict[str, Any], zero_stage: int) -> list[str]:
    parameters, micro, step, host = (stage[key] for key in ("parameters", "micro_batch", "step", "host_memory"))
    groups = ", ".join(f"{name} {short(count)}" for name, count in parameters["groups"].items())
    trained, frozen = (short(parameters[key]) for key in ("trainable", "frozen"))
    sent = ", ".join(f"{part} {short(size, 'B')}" for part, size in step["sent"].items() if size) or "nothing"
    largest = f"{micro['largest_tokens']} tokens ({micro['largest_sequences']} sequences)"
    each, whole = short(stage["flops_per_impression"], "FLOP"), short(step["flops"], "FLOP")
    lines = [
        f"stage {stage['stage']}: {trained} parameters trained, {frozen} frozen ({groups})",
        _memory(stage["memory"], zero_stage),
        f"micro-batch   {micro['per_step']} a step and worker, the fullest of {micro['tokens']} tokens: "
        f"activations {gib(micro['activations'])}, peak {gib(micro['peak'])}; largest that fits {largest}",
        f"compute       {each} per impression, {whole} per step and worker",
        f"sent          {sent} per step and worker",
        f"host memory   {', '.join(f'{part} {gib(size)}' for part, size in host.items())}: {gib(sum(host.values()))} a node",
    ]
    if "epoch" in stage:
        epoch = stage["epoch"]
        cost = f", {epoch['cost']:.2f} to pay" if "cost" in epoch else ""
        storage = short(epoch["storage_bytes_per_s"], "B/s")
        lines += [
            f"step          {step['seconds']:.4g} s: compute {step['compute']:.3g}, communication {step['communication']:.3g} "
            f"(hidden by {short(step['hides'], 'B/s')}), optimiser {step['optimiser']:.3g}",
            f"epoch         {step['steps_per_epoch']} steps, {epoch['hours']:.4g} h{cost}: "
            f"{epoch['impressions_per_s']:.4g} impressions/s, {storage} from the storage to a node",
        ]
    return [*lines, f"limited by    {stage['limited_by']}"]


def _memory(stages: dict[str, Any], chosen: int) -> str:
    """A row per ZeRO stage; parts that are there in a step alone are in brackets."""
    rows = [["memory", "between steps", "", "in a step", "", "together"]]
    for name, found in stages.items():
        mark = "*" if name == f"zero_{chosen}" else ""
        parts = [", ".join(f"{part} {gib(size)}" for part, size in found[when].items() if size) for when in ("static", "step")]
        sums = [gib(sum(found[when].values())) for when in ("static", "step")]
        rows.append([f"{name.replace('_', ' ')}{mark}", sums[0], parts[0], sums[1], parts[1], gib(found["total"])])
    return aligned(rows, left=5)


def _sweep(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in ("nodes", "devices", "peak", "hours", "impressions_per_s", "cost") if any(key in row for row in rows)]
    shown = {"peak": gib, "hours": "{:.4g}".format, "impressions_per_s": "{:.4g}".format, "cost": "{:.2f}".format}
    cells = [[shown.get(key, str)(row[key]) if key in row else "" for key in keys] for row in rows]
    limits = [row.get("error", row.get("limited_by", "")) for row in rows]
    return "\n".join(
        f"{line}  {limit}"
        for line, limit in zip(aligned([keys, *cells], left=0).splitlines(), ["limited_by", *limits], strict=True)
    )


def gib(size: float) -> str:
    """Bytes in GiB, or MiB where they are few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def short(number: float, unit: str = "") -> str:
    """With three digits, and a letter for thousands, millions, ... before the unit."""
    letter, size = next(((letter, size) for letter, size in _UNITS if abs(number) >= size), ("", 1.0))
    return f"{number / size:.3g} {letter}{unit}".rstrip()
