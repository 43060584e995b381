"""What can be known to be wrong before a worker is started: data set, tokenizer, sequences, a backbone, a missing package."""

import logging

from ctrsink.config import RunSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError
from ctrsink.families.facts import Facts
from ctrsink.train.observe.mlflow_run import require_mlflow

log = logging.getLogger("ctrsink.train")


def check(spec: RunSpec) -> Facts:
    """Check that the data set exists and fits the run and its model; returns what the model is built from.

    Raises:
        InputError: it does not, or was not; or the model cannot be built; or the run is to be in MLflow, which is not installed.
    """
    if spec.train.mlflow is not None:
        require_mlflow()
    manifest = read_manifest(spec.data.uri)
    if not manifest.splits["train"].impressions:
        raise InputError(f"the data set {spec.data.uri} has no impression in its train split: prepare it again")
    newest = "the newest part of " * (len(manifest.parts) > 1)
    for split in spec.evaluate.splits:
        if not manifest.parts[-1].splits[split].impressions:
            raise InputError(
                f"{newest}the data set {spec.data.uri} has no impression in its {split} split: leave it out of evaluate.splits"
            )
    least = min((part.past_events for part in manifest.parts[1:]), default=spec.data.history)
    if least < spec.data.history:
        log.warning(
            "a part of %s was appended with prepare.past_events %d: there histories are shorter than data.history %d",
            spec.data.uri, least, spec.data.history,
        )  # fmt: skip
    from ctrsink.families.registry import family_of  # imports torch: what is refused above is refused at once

    return family_of(spec.model.family).check(spec, manifest, lambda: vocabulary_of(spec.data.uri))


def vocabulary_of(uri: str) -> int:
    """Tokens of a data set's tokenizer."""
    from ctrsink.prepare.tokenize import load_tokenizer  # takes a second and more: what is refused before is refused at once

    return len(load_tokenizer(uri))
