"""A run's folder becomes the model it trained, in fp32 on the CPU; neither Ray nor DeepSpeed is needed."""

from dataclasses import dataclass

from ctrsink.config import ReadoutSpec, RunSpec
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.families.decoder.build import build_model, load_parameters
from ctrsink.families.decoder.model import CTRModel
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.run.folder import identities, read_run
from ctrsink.stream.stream import SequenceSource
from ctrsink.train.checkpoint.checkpoint import Checkpoint, Step, find_checkpoint, require_data
from ctrsink.train.stages import StageController


@dataclass(frozen=True)
class TrainedRun:
    """A run's configuration, data set and model, as of one checkpoint."""

    spec: RunSpec
    dataset: Dataset
    layout: Layout
    checkpoint: Checkpoint
    model: CTRModel
    """In evaluation mode; LoRA not merged."""
    readout: ReadoutSpec
    """That of the stage which made the checkpoint."""


def restore_run(run_dir: str, step: Step = None) -> TrainedRun:
    """The model of the run in `run_dir` at a checkpoint (default: its latest whole one).

    Raises:
        InputError: there is no such run or checkpoint, or its data set is missing, altered or another.
    """
    spec = read_run(run_dir)
    # The folder may have been moved or copied since; what it says of its own place counts for nothing.
    spec = spec.model_copy(update={"run_dir": run_dir})
    checkpoint = find_checkpoint(run_dir, step)
    dataset = Dataset(spec.data.uri, 2 * spec.data.shuffle_shards, Cache.of(spec.data.cache))
    require_data(run_dir, checkpoint, identities(spec, dataset.manifest), spec.data.uri)
    layout = Layout.of(spec.data, spec.model, dataset.manifest)
    # Wherever the run trained, this is the backend that every device has.
    portable = spec.model.model_copy(update={"attention": "sdpa"})
    precision = checkpoint.precision or spec.train.precision  # frozen weights were rounded to it
    model = build_model(portable, len(load_tokenizer(spec.data.uri)), spec.seed, precision).float()
    model.mixed_precision = False
    load_parameters(model, checkpoint.parameters)
    controller = StageController(spec, sum(SequenceSource(dataset, "train", layout).per_shard))
    controller.load_state_dict(checkpoint.controller)
    return TrainedRun(spec, dataset, layout, checkpoint, model.eval(), controller.stage.readout)
