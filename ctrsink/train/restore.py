"""A run's folder becomes the model it trained, in fp32 on the CPU; neither Ray nor DeepSpeed is needed."""

from dataclasses import dataclass, replace

from ctrsink.config import RunSpec
from ctrsink.config.stages import Objective, StageSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import load_parameters
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of, source_of
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.run.folder import identities, read_run
from ctrsink.tables.embedding import share_out
from ctrsink.train.checkpoint.checkpoint import PARAMETERS, Checkpoint, Step, find_checkpoint, require_data
from ctrsink.train.checkpoint.tensor_file import mapped
from ctrsink.train.stages import StageController


@dataclass(frozen=True)
class TrainedRun:
    """A run's configuration, data set and model, as of one checkpoint."""

    spec: RunSpec
    dataset: Dataset
    layout: Layout
    checkpoint: Checkpoint
    facts: Facts
    model: CTRModule
    """In evaluation mode; LoRA not merged, sharded tables whole in this process. What was trained is mapped from the checkpoint's
    file, and may be written to: that goes to memory."""
    objective: Objective
    """That of the stage which made the checkpoint."""


def restore_run(run_dir: str, step: Step = None) -> TrainedRun:
    """The model of the run in `run_dir` at a checkpoint (default: its latest whole one).

    Raises:
        InputError: there is no such run or checkpoint, or its data set is missing, altered or another.
    """
    spec = read_run(run_dir)
    # The folder may have been moved or copied since; what it says of its own place counts for nothing.
    spec = spec.model_copy(update={"run_dir": run_dir})
    checkpoint = find_checkpoint(run_dir, step, Topology())
    dataset = Dataset.of(spec.data)
    require_data(run_dir, checkpoint, identities(spec, dataset.manifest), spec.data.uri)
    family = family_of(spec.model.family)
    assert checkpoint.here is not None
    checkpoint = replace(checkpoint, parameters=mapped(checkpoint.here.path / PARAMETERS))
    checkpoint = checkpoint.under_present_names(family.earlier_names)
    layout = family.layout(spec.data, spec.model, dataset.manifest)
    facts = Facts(len(load_tokenizer(spec.data.uri)))
    precision = checkpoint.precision or spec.train.precision  # frozen weights were rounded to it
    model = family.build(family.portable(spec.model), facts, spec.seed, precision).float()
    model.mixed_precision = False
    load_parameters(model, checkpoint.parameters, copied=False)
    share_out(model, Topology(), checkpoint.tables)
    controller = StageController(spec, sum(source_of(dataset, "train", layout).per_shard))
    controller.load_state_dict(checkpoint.controller)
    require_clicks(run_dir, checkpoint, controller.stage)
    return TrainedRun(spec, dataset, layout, checkpoint, facts, model.eval(), controller.stage.learns)


def require_clicks(run_dir: str, checkpoint: Checkpoint, stage: StageSpec) -> None:
    """Raise InputError where the stage that made the checkpoint foretells no clicks."""
    if stage.objective != "click":
        raise InputError(
            f"the checkpoint of step {checkpoint.step} of {run_dir} is of the stage {stage.name}, which foretells no clicks: "
            "name one of a later stage with --checkpoint, or let the run go on"
        )
