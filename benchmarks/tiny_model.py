"""Useful tokens per second of the demo's tiny model: workers of one thread each, and what DeepSpeed, Adam and compilation cost.

Each worker takes the steps of `configs/ctr-sink.yaml`, its last stage, in a process of its own. Contestants alternate.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.raw import CONFIGS, synthetic_log
from benchmarks.report import machine, machine_line, markdown
from benchmarks.training import Work, prepare_once, rates, stream_of, work_for
from ctrsink import logs, strict_json
from ctrsink.config import RunSpec, load_run
from ctrsink.errors import InputError
from ctrsink.runtime.preflight import check
from ctrsink.runtime.process import prepare_process
from ctrsink.stream.stream import Step

ENGINES = ("deepspeed", "torch", "torch, fused Adam")
COMPILE = ("nothing", "layers", "backbone")


@dataclass(frozen=True)
class Contestant:
    """How the model is trained."""

    workers: int
    engine: str
    """One of ENGINES: what training does, or torch alone with the given form of AdamW."""
    compiled: str
    """One of COMPILE: what torch.compile is given."""


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    logs.configure()
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            report = run(args, Path(folder).resolve())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.tiny_model", description=__doc__)
    parser.add_argument("--log", metavar="DIR", help="folder of MovieLens-100K (default: a synthetic log)")
    parser.add_argument("--events", type=int, default=100_000, help="size of the synthetic log (default: %(default)s)")
    parser.add_argument("--workers", nargs="+", type=int, choices=[1, 2], default=[1, 2], help="processes of one thread each")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["deepspeed"])
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["nothing"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median is told")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each contestant in each round")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts; compiling takes place here")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for configs/ctr-sink.yaml")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare the log below `folder`, train every contestant in rounds, and return all figures.

    Raises:
        InputError: the log or an override cannot be used.
    """
    found = machine()
    spec = spec_of(args, folder)
    prepare_once(spec)
    everybody = [Contestant(w, engine, compiled) for w in args.workers for engine in args.engine for compiled in args.compile]
    rounds: dict[Contestant, list[Work]] = {who: [] for who in everybody}
    for number in range(args.repeats):
        for who in everybody:
            rounds[who].append(train(spec, who, args.warmup, args.seconds, folder / f"meet-{number}-{everybody.index(who)}"))
    names = ("repeats", "seconds", "warmup", "overrides")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in names} | {"log": "given" if args.log else f"{args.events} events"},
        "speed": [asdict(who) | rates(done) for who, done in rounds.items()],
    }


def spec_of(args: argparse.Namespace, folder: Path) -> RunSpec:
    """The demo's run on the given or a synthetic log."""
    own = [f"run_dir={folder / 'run'}", f"data.uri={folder / 'data'}"]
    if args.log:
        own.append(f"prepare.source.path={Path(args.log).resolve()}")
    else:
        made = load_run(str(synthetic_log(folder, args.events)), []).prepare
        assert made is not None
        parts = ("source", "tokenizer", "statistics")
        own += [f"prepare.{name}={getattr(made, name).model_dump_json()}" for name in parts]
    return load_run(str(CONFIGS / "ctr-sink.yaml"), [*own, *args.overrides])


def train(spec: RunSpec, who: Contestant, warmup: int, seconds: float, meet: Path) -> Work:
    """All workers together: the sum of what they did in the time of the slowest."""
    runtime = spec.runtime.model_copy(update={"workers": who.workers})
    spec = spec.model_copy(update={"runtime": runtime})
    context = multiprocessing.get_context("spawn")
    with context.Pool(who.workers) as pool:
        jobs = [(spec, who, rank, warmup, seconds, str(meet)) for rank in range(who.workers)]
        done = pool.starmap(work_of, jobs, chunksize=1)
    return Work(
        steps=done[0].steps,
        impressions=done[0].impressions,  # a step's are those of the global batch
        tokens=sum(work.tokens for work in done),
        seconds=max(work.seconds for work in done),
    )


def work_of(spec: RunSpec, who: Contestant, rank: int, warmup: int, seconds: float, meet: str) -> Work:
    """What one worker does, in its own process: warm up, then as many steps as the first worker's clock allows."""
    world = str(who.workers)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    prepare_process("cpu", 1, rank)
    import torch.distributed as dist

    from ctrsink.dist import Topology, all_sum, barrier

    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=who.workers)
    topology = Topology(rank, who.workers)
    step = _stepper(spec, who, topology)
    steps = stream_of(spec, rank, who.workers)
    work_for(step, steps, 0.0, warmup)
    # All workers must take equally many steps: a trial of a few says how many fit.
    trial = work_for(step, steps, 0.0, 3)
    slowest = all_sum([trial.seconds], topology)[0] / who.workers / trial.steps
    work = work_for(step, steps, 0.0, max(1, round(seconds / slowest)))
    barrier(topology)  # see tables_training
    dist.destroy_process_group()
    return work


def _stepper(spec: RunSpec, who: Contestant, topology: Any) -> Callable[[Step], object]:
    import torch

    from ctrsink.config.model import DecoderSpec
    from ctrsink.families.decoder.build import build_model
    from ctrsink.families.decoder.model import decoder_layers

    stage = spec.stages[-1]
    assert isinstance(spec.model, DecoderSpec)
    model = build_model(spec.model, check(spec).vocabulary, spec.seed, spec.train.precision).train()
    if who.compiled == "layers":
        for layer in decoder_layers(model.backbone):
            layer.compile(dynamic=True)
    elif who.compiled == "backbone":
        model.backbone.compile(dynamic=True)
    if who.engine == "deepspeed":
        from ctrsink.train.engine import Engine

        engine = Engine(model, spec, stage, topology, None)
        return lambda taken: engine.step(taken.micro_batches, taken.impressions, stage, 1.0)

    from ctrsink.train.engine import parameter_groups

    groups = parameter_groups(model, stage.trainable, spec.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=spec.train.betas, fused="fused" in who.engine)
    trained = [p for group in groups for p in group["params"]]

    def step(taken: Step) -> None:
        for batch in taken.micro_batches:
            (model(batch, stage.learns).loss / taken.impressions).backward()
        _sum_gradients(trained, topology.world)
        torch.nn.utils.clip_grad_norm_(trained, spec.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sum_gradients(trained: list[Any], world: int) -> None:
    """Over all workers, as one vector."""
    if world == 1:
        return
    import torch
    import torch.distributed as dist

    gradients = [p.grad for p in trained]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = ["engine", "compiled", "workers", "useful tokens/s", "impressions/s", "slowest", "fastest", "ms/step", "steps"]
    keys = ["engine", "compiled", "workers", "tokens_per_s", "impressions_per_s", "slowest", "fastest"]
    rows = [[*(row[key] for key in keys), 1000 * row["s_per_step"], row["steps"]] for row in report["speed"]]
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
