"""The configuration of a run: pydantic sections (RunSpec), YAML with `include`, dotted overrides."""

from ctrsink.config.data import DataSpec, PrepareSpec, SourceSpec
from ctrsink.config.load import dump_run, load_run, load_serve, load_study, parse_run
from ctrsink.config.model import BackboneSpec, BiasSpec, LoraSpec, ModelSpec, SinkSpec
from ctrsink.config.run import RunSpec
from ctrsink.config.serve import ServeSpec
from ctrsink.config.stages import Group, ReadoutSpec, ScheduleSpec, StageSpec
from ctrsink.config.study import StudySpec
from ctrsink.config.train import EvaluateSpec, KeepSpec, RuntimeSpec, TrainSpec

__all__ = [
    "BackboneSpec", "BiasSpec", "DataSpec", "EvaluateSpec", "Group", "KeepSpec", "LoraSpec", "ModelSpec",
    "PrepareSpec", "ReadoutSpec", "RunSpec", "RuntimeSpec", "ScheduleSpec", "ServeSpec", "SinkSpec", "SourceSpec", "StageSpec",
    "StudySpec", "TrainSpec", "dump_run", "load_run", "load_serve", "load_study", "parse_run",
]  # fmt: skip
