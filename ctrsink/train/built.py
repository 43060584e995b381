"""The model that an engine begins with; under ZeRO-3 no process ever holds the whole of it."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.dist import Topology
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import load_parameters, set_trainable, trained_in
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of
from ctrsink.train.deepspeed_import import deepspeed
from ctrsink.train.engine import deepspeed_config
from ctrsink.train.host_memory import giving_back
from ctrsink.train.parts import InParts


def built(
    spec: RunSpec, stage: StageSpec, facts: Facts, topology: Topology, precision: str, parameters: Mapping[str, torch.Tensor]
) -> CTRModule:
    """The model, with what earlier stages trained, ready to train; under ZeRO-3 collective.

    Its values are the same under every ZeRO stage and on any number of ranks. Under ZeRO-3 a rank's memory holds its share of the
    weights, and whole only the one that is made or cut at the moment.

    Args:
        precision: of the run, see Family.build.
        parameters: values by name; each is made once, in their order.

    Raises:
        InputError: it cannot be built, or these are not its parameters.
    """
    if spec.train.zero_stage == 3:
        return _sharded(spec, stage, facts, topology, precision, parameters).to(topology.device).train()
    model = family_of(spec.model.family).build(spec.model, facts, spec.seed, precision)
    narrow = trained_in(model, stage.trainable, spec.train.weights)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if model.trained_as(name, stage.trainable) is None else narrow

    # Narrow before they meet the device, and one after the other: neither host nor device has room for all in fp32.
    load_parameters(model, parameters, dtype_of=dtype_of)
    set_trainable(model, stage.trainable, spec.train.weights)
    return model.to(topology.device).train()


def _sharded(
    spec: RunSpec, stage: StageSpec, facts: Facts, topology: Topology, precision: str, parameters: Mapping[str, torch.Tensor]
) -> CTRModule:
    """The shards of each parameter lie on the device, or where `train.offload` has them, as DeepSpeed itself begins with."""
    parts = InParts(topology)
    # Transformers would read pretrained weights in threads of its own, which do not know of a mode of this one.
    with giving_back(), patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
        with parts if topology.world > 1 else nullcontext():
            model = family_of(spec.model.family).build(spec.model, facts, spec.seed, precision)
            load_parameters(model, parameters)
            set_trainable(model, stage.trainable, spec.train.weights)
        first: Any = None
        config = deepspeed_config(spec, {name: p for name, p in model.named_parameters() if p.requires_grad})
        for parameter in model.parameters():
            parts.fill(parameter)
            if not parameter.untyped_storage().resizable():  # mapped from a file, which DeepSpeed would write to
                parameter.data = parameter.data.clone()
            if first is None:
                first = parameter
                deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=config)
            else:
                first.convert_to_zero_parameters([parameter])
        for buffer in model.buffers():
            parts.fill(buffer)
    return model
