"""One DeepSpeed engine: what a stage trains, under any ZeRO stage, with its state readable and writable by parameter name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ctrsink.config.run import RunSpec
from ctrsink.config.stages import Group, Objective, StageSpec
from ctrsink.dist import Topology, all_max, gather_parts, sent, summed
from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import CTRModule, Out
from ctrsink.sequences.batch import Batch
from ctrsink.tables.shares import Share
from ctrsink.train.deepspeed_import import (
    deepspeed,
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from ctrsink.train.feed import fed, placed
from ctrsink.train.stage_tables import StageTables
from ctrsink.train.tensors import Source, Tensors, in_memory

MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed is told where each step ends, so this is a factor of the loss; above 1, or it would not accumulate where it offloads.
ACCUMULATION = 2


@dataclass
class EngineState:
    """Everything of an engine that must survive: by name, independent of the number of ranks and the ZeRO stage."""

    parameters: Mapping[str, torch.Tensor]
    """fp32 values of the trainable parameters."""
    moments: Mapping[str, torch.Tensor]
    """Adam's two moments, named `<parameter>/exp_avg` and `<parameter>/exp_avg_sq`."""
    steps: dict[str, int]
    """Optimiser steps that each parameter group has made."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step of all ranks gave."""

    loss: float
    """Mean over the impressions of the global batch, or what else the objective counts."""
    grad_norm: float
    """Of the whole gradient, before clipping; where it is not finite nothing was changed."""
    votes: tuple[float, ...] = ()
    """Sums over ranks of what each rank handed in."""


class Engine:
    """Trains the groups of one stage.

    Args:
        model: its trainable parameters already hold the values to start from.
        state: moments and step counts to go on with; those of groups that this stage does not train are ignored.
        held: this rank's rows of sharded tables to go on with; None: a new run's.
        masters: values, in fp32, that the model was given: where it holds them rounded, Adam goes on with these.
    """

    def __init__(
        self,
        model: CTRModule,
        spec: RunSpec,
        stage: StageSpec,
        topology: Topology,
        state: EngineState | None,
        held: Mapping[str, Share] | None = None,
        masters: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.model, self.topology, self.zero_stage = model, topology, spec.train.zero_stage
        self.trainable, self.clip_norm, self._offload = stage.trainable, spec.train.clip_norm, spec.train.offload
        self.tables = StageTables(model, stage, topology, held)
        set_trainable(model, stage.trainable, spec.train.weights)
        trained = parameter_groups(model, stage.trainable, spec.train.weight_decay)
        self._group_names = [g["name"] for g in trained]
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Where the host steps it, its memory is passed over once for all of Adam, not once for each of its operations.
        optimizer = torch.optim.AdamW(trained, lr=1e-8, betas=spec.train.betas, eps=1e-8, fused=spec.train.offload)
        # What DeepSpeed wraps Adam in depends on the ZeRO stage and has no common type.
        self.deepspeed: Any
        self.optimizer: Any
        if topology.world > 1 and groups._WORLD_GROUP is None:
            # DeepSpeed would make this group itself, with torch's default time-out: half an hour.
            groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=spec.runtime.collective_timeout_s))
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(spec, self.named), dist_init_required=False
        )
        self._base: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.zero_stage in (1, 2):
            self.optimizer.check_grad_overflow = True  # DeepSpeed switches it off without fp16: a NaN would reach the weights
        self.tables.join(self.optimizer, self.zero_stage)
        self._total = self._votes = torch.empty(0)
        self._found: tuple[float, ...] = ()
        if self.zero_stage in (1, 2):
            self._join_reads()
        self._create_moments()
        if state is not None:
            self.load(state)
        for name, parameter in self.named.items():
            if parameter.dtype != torch.float32 and masters is not None and name in masters:
                self._set_master(parameter, masters[name].to(topology.device))

    def forward(self, batch: Batch, objective: Objective) -> Out:
        """See CTRModule.forward; every rank must call it equally often."""
        return self.deepspeed(placed(batch, self.topology.device), objective)

    def step(self, batches: list[Batch], units: int, stage: StageSpec, factor: float, votes: Sequence[float] = ()) -> StepResult:
        """One optimiser step over the micro-batches of this rank.

        Impressions, or what else the objective counts, weigh equally whatever micro-batch or rank holds them, so the result does
        not depend on how a global batch is shared out: `units` is their number in the global batch. Every rank must bring equally
        many micro-batches.

        A gradient with a NaN or an infinity, be it of sharded tables or of all else, changes neither weights nor moments; its
        norm tells. Both are clipped by the norm of both.

        Args:
            votes: numbers of this rank that travel with the sum of the losses, at no cost.
        """
        for group, name in zip(self.optimizer.param_groups, self._group_names, strict=True):
            group["lr"] = stage.lr[name.split("/")[0]] * factor
        self._total = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        self._votes = sent(torch.tensor(votes, dtype=torch.float64), self.topology)
        # DeepSpeed divides by its accumulation and averages over ranks; both are undone here.
        weight = ACCUMULATION * self.topology.world / units
        for number, batch in enumerate(fed(batches, self.topology.device), start=1):
            self.deepspeed.set_gradient_accumulation_boundary(last := number == len(batches))
            loss = self.forward(batch, stage.learns).loss
            self.deepspeed.backward(loss * weight)
            self._total += loss.detach()
            if last:
                self.tables.collect()
            if not last or self.zero_stage > 0:
                self.deepspeed.step()
        if self.zero_stage == 0:
            self._read(nn.utils.get_total_norm(self._gradients()))
        elif self.zero_stage == 3:
            self._read(self.deepspeed.get_global_grad_norm())
        loss, norm, *summed_votes = self._found
        if self.zero_stage == 0:
            norm = math.hypot(norm, self.tables.norm)
            self._step_dense(norm)
        if math.isfinite(norm):
            self.tables.step(stage, factor, self._scale(norm))
        else:
            self.tables.discard()
        return StepResult(loss / units, norm, tuple(summed_votes))

    def _read(self, norm: torch.Tensor | float) -> None:
        """Sum of all losses, this norm of the dense gradient, sums of votes: the one time in a step that the host waits."""
        beside = sent(torch.as_tensor(norm, dtype=torch.float64), self.topology)
        sums = summed(torch.cat([self._total[None], self._votes]), self.topology)
        self._found = tuple(torch.cat([sums[:1], beside[None], sums[1:]]).tolist())

    def _join_reads(self) -> None:
        """Give DeepSpeed the norm on the host, by the one read of a step: it looks at it again for each group of parameters.

        Whether a gradient overflowed it need not ask beside: the norm is no number then, and it looks for that, too.
        """
        of_all = self.optimizer.scaled_global_norm

        def read() -> torch.Tensor:
            norm = of_all()
            self._read(norm)
            return torch.tensor(self._found[1], dtype=norm.dtype)

        self.optimizer.scaled_global_norm = read
        self.optimizer.has_overflow = lambda partition_gradients=True: False

    def _step_dense(self, norm: float) -> None:
        """What ends a step under ZeRO 0, where DeepSpeed, of what it holds, clips by its own norm and steps whatever that is."""
        if not math.isfinite(norm):
            self.deepspeed.zero_grad()
            return
        if self.tables.norm:
            torch._foreach_mul_(self._gradients(), self._scale(norm))
        self.deepspeed.step()

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.named.values() if p.grad is not None]

    def _scale(self, norm: float) -> float:
        """What clipping makes of a gradient of this norm, as torch and DeepSpeed do it."""
        return min(1.0, self.clip_norm / (norm + 1e-6))

    def state(self, wanted: bool = True, kept: tuple[Group, ...] | None = None) -> EngineState:
        """Collective: every rank must call it, and gets the whole state on the CPU; an empty one where it is not `wanted`.

        Args:
            wanted: of interest on this rank.
            kept: groups whose moments are (None: all).
        """
        given = self.given_state(kept)
        return EngineState(in_memory(given.parameters, wanted), in_memory(given.moments, wanted), given.steps)

    def given_state(self, kept: tuple[Group, ...] | None = None) -> EngineState:
        """The state as it is now, of which each tensor is gathered, by all ranks together, when it is asked for.

        Under ZeRO-3 it holds this rank's parts, and so outlives the engine. Else it does not.

        Args:
            kept: groups whose moments are of interest (None: all).
        """
        parameters, moments = {}, {}
        for name, parameter in self.named.items():
            parameters[name] = self._value(parameter)
            for key in MOMENTS if kept is None or self.model.trained_as(name, kept) else ():
                moments[f"{name}/{key}"] = self._moment(parameter, key)
        return EngineState(Tensors(parameters), Tensors(moments), self.steps())

    def handed_on(self, kept: tuple[Group, ...]) -> EngineState:
        """Collective: the state for a next engine, of which this one may be destroyed; under ZeRO-3 each rank holds its part.

        Args:
            kept: groups whose moments the next engine goes on with.
        """
        return self.given_state(kept) if self.zero_stage == 3 else self.state(kept=kept)

    def left_alone(self, parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Those of `parameters` that this stage does not train; under ZeRO-3 as the shards of the model, which was given them."""
        names = [name for name in parameters if name not in self.named]
        if self.zero_stage < 3:
            return {name: parameters[name] for name in names}
        found: dict[str, Any] = dict(self.model.named_parameters())
        return Tensors({name: _shared(found[name], found[name].ds_tensor, self.topology) for name in names})

    def is_finite(self) -> bool:
        """Collective: whether every trained weight, of which each rank looks at its own part, is a finite number."""
        own = (self._own_values(parameter) for parameter in self.named.values())
        bad = any(not value.isfinite().all() for value in own) or not self.tables.is_finite()
        return not all_max(int(bad), self.topology)

    def _own_values(self, parameter: Any) -> torch.Tensor:
        """What this rank holds of a parameter; under ZeRO-3 without what fills a last share up, which nobody set."""
        share = getattr(parameter, "ds_tensor", None)
        if share is None:
            return parameter
        return share.flatten()[: max(0, parameter.ds_numel - self.topology.rank * share.numel())]

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers; the model stays usable by a next engine (ZeRO 0 to 2)."""
        self.deepspeed.destroy()

    def _value(self, parameter: Any) -> Source:
        if self.zero_stage == 3:
            return _shared(parameter, self._local(safe_get_local_fp32_param(parameter)), self.topology)

        def gathered() -> torch.Tensor:
            value = safe_get_full_fp32_param(parameter)
            return _copied(parameter if value is None else value)

        return Source(parameter.shape, gathered)

    def _moment(self, parameter: Any, key: str) -> Source:
        if self.zero_stage == 3:
            return _shared(parameter, self._local(safe_get_local_optimizer_state(parameter, key)), self.topology)
        if self.zero_stage == 0:
            return Source(parameter.shape, lambda: _copied(self._base.state[parameter][key]))
        return Source(parameter.shape, lambda: _copied(safe_get_full_optimizer_state(parameter, key)))

    def _local(self, part: torch.Tensor) -> torch.Tensor:
        # DeepSpeed hands out what is offloaded on the device, where there may be no room for all of it.
        return part.cpu() if self._offload else part

    def _create_moments(self) -> None:
        """Adam makes its state at its first step; making it now lets a state be loaded before."""
        for parameters in self._flat_groups():
            for p in parameters:
                zeros = {key: torch.zeros_like(p.data) for key in MOMENTS}
                self._base.state[p] = {"step": torch.zeros((), dtype=torch.float32), **zeros}
        if self.zero_stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[list[torch.Tensor]]:
        """The tensors that Adam really steps, per parameter group."""
        if self.zero_stage < 3:
            return [group["params"] for group in self._base.param_groups]
        groups: list[list[torch.Tensor]] = [[] for _ in self._group_names]
        for number, flat in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            groups[self.optimizer.sub_group_to_group_id[number]].append(flat)
        return groups

    def steps(self) -> dict[str, int]:
        """Optimiser steps that each parameter group has made."""
        pairs = zip(self._group_names, self._flat_groups(), strict=True)
        return {name: int(self._base.state[flat[0]]["step"]) for name, flat in pairs}

    def load(self, state: EngineState) -> None:
        """Go on with these moments and step counts; what this engine does not train is ignored."""
        for name, parameter in self.named.items():
            # Without the step count of its group (it was trained as part of another) a moment would be corrected wrongly.
            if group_key(self.model, name, parameter, self.trainable) not in state.steps:
                continue
            for key in MOMENTS:
                value = state.moments.get(f"{name}/{key}")
                if value is not None:
                    self._set_moment(parameter, key, value.to(self.topology.device))
        for name, flat in zip(self._group_names, self._flat_groups(), strict=True):
            for p in flat:
                self._base.state[p]["step"].fill_(state.steps.get(name, 0))

    def _set_moment(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if self.zero_stage == 0:
            self._base.state[parameter][key].copy_(value)
        elif self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            local = self._part(value, safe_get_local_optimizer_state(parameter, key).numel())
            safe_set_local_optimizer_state(parameter, local, key)

    def _set_master(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        if self.zero_stage < 3:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_local_fp32_param(parameter, self._part(value, safe_get_local_fp32_param(parameter).numel()))

    def _part(self, value: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's, as ZeRO-3 cuts it; DeepSpeed's own setters for whole values fail where the ranks do not divide it."""
        padded = nn.functional.pad(value.flatten(), (0, size * self.topology.world - value.numel()))
        return padded.narrow(0, size * self.topology.rank, size)


def _shared(parameter: Any, part: torch.Tensor, topology: Topology) -> Source:
    """A tensor of which each rank holds a part, as ZeRO-3 cuts it: equally long, the last ones reach beyond the end."""
    shape: torch.Size = parameter.ds_shape
    return Source(shape, lambda: gather_parts(part.detach(), topology)[: shape.numel()].view(shape).float().cpu())


def _copied(value: Any) -> torch.Tensor:
    return value.detach().float().cpu().clone()


def parameter_groups(model: CTRModule, trainable: tuple[Group, ...], weight_decay: float) -> list[dict[str, Any]]:
    """Adam's parameter groups: one per trained group and whether its matrices decay; vectors and scalars never do."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = group_key(model, name, parameter, trainable)
        if key is not None:
            found.setdefault(key, []).append(parameter)
    return [
        {"name": key, "params": found[key], "weight_decay": weight_decay if key.endswith("/decay") else 0.0}
        for key in sorted(found)
    ]


def group_key(model: CTRModule, name: str, parameter: nn.Parameter, trainable: tuple[Group, ...]) -> str | None:
    """Name of the parameter group that a stage trains the parameter in; None where it is frozen."""
    group = model.trained_as(name, trainable)
    # Under ZeRO-3 the parameter itself is empty; its shape is kept beside it.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return None if group is None else f"{group}/{'decay' if model.decays(name, len(shape)) else 'plain'}"


def deepspeed_config(spec: RunSpec, named: dict[str, nn.Parameter]) -> dict[str, Any]:
    """DeepSpeed's configuration; buckets are no larger than what is trained, because DeepSpeed allocates them whole."""
    bucket = min(sum(getattr(p, "ds_numel", p.numel()) for p in named.values()), 200_000_000)
    bucket += -bucket % 512  # DeepSpeed wants a multiple of its alignment
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": spec.train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": spec.train.zero_stage,
            "overlap_comm": spec.runtime.device == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **(offloaded(spec.train.zero_stage, spec.runtime.device) if spec.train.offload else {}),
        },
    }


def offloaded(zero_stage: int, device: str) -> dict[str, Any]:
    """What DeepSpeed keeps in the host's memory: Adam's state, and whole weights only where they are sharded too.

    On CUDA it is pinned, so that copies go on beside the computation.
    """
    host = {"device": "cpu", "pin_memory": device == "cuda"}
    return {"offload_optimizer": host} | ({"offload_param": host} if zero_stage == 3 else {})
