"""What can be known to be wrong before a worker is started: data set, tokenizer, sequences, a backbone, a missing package."""

import logging

from ctrsink.config import RunSpec
from ctrsink.dataset.manifest import Manifest, read_manifest
from ctrsink.errors import InputError, first_line
from ctrsink.train.observe.mlflow_run import require_mlflow

log = logging.getLogger("ctrsink.train")


def check(spec: RunSpec) -> int:
    """Check that the data set exists, was prepared with the model's tokenizer and fits the run; returns the tokenizer's size.

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
    _warn_of_shared_rows(spec, manifest)
    vocabulary = _vocabulary(spec, manifest)
    _check_sequences(spec, manifest, vocabulary)
    return vocabulary


def _warn_of_shared_rows(spec: RunSpec, manifest: Manifest) -> None:
    for key, told in (("sinks", spec.model.sinks), ("target", spec.model.target)):
        if told is not None and "item_id" in told.signals and manifest.item_count >= told.rows:
            log.warning(
                "model.%s.rows %d: some of the %d items of %s share an embedding of item_id; from rows %d on none does",
                key, told.rows, manifest.item_count, spec.data.uri, manifest.item_count + 1,
            )  # fmt: skip


def _check_sequences(spec: RunSpec, manifest: Manifest, vocabulary: int) -> None:
    """Refuse what would end the run at some later step: a sequence too long for the backbone, or one that shows its answers."""
    from ctrsink.dataset.cache import Cache
    from ctrsink.dataset.layout import Layout
    from ctrsink.dataset.reader import Dataset
    from ctrsink.families.decoder.build import backbone_config
    from ctrsink.families.decoder.supported import length_limit, too_long
    from ctrsink.stream.foresee import longer_than, suspects

    limit, reason = length_limit(backbone_config(spec.model, vocabulary)) or (None, "")
    layout = Layout.of(spec.data, spec.model, manifest)
    shards = suspects(manifest, layout, limit)
    if not shards:
        return
    dataset = Dataset(spec.data.uri, 2, Cache.of(spec.data.cache))
    measured = spec.evaluate.splits if spec.evaluate.max_sequences is None else ()
    length = longer_than(limit, dataset, layout, sorted({"train", *measured}), shards)
    if length is not None:
        raise InputError(too_long(reason, length))


def _vocabulary(spec: RunSpec, manifest: Manifest) -> int:
    from transformers import AutoTokenizer  # takes a second and more: what is refused above is refused at once

    from ctrsink.prepare.tokenize import fingerprint, load_tokenizer

    backbone = spec.model.backbone
    if backbone.path is None:
        vocabulary = len(load_tokenizer(spec.data.uri))
        from ctrsink.families.decoder.build import check_model  # seconds of imports, that no refusal above waits for

        check_model(spec.model, vocabulary)
        return vocabulary
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone.path, revision=backbone.revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model.backbone.path {backbone.path}: no tokenizer ({first_line(error)})") from None
    if fingerprint(tokenizer) != manifest.tokenizer_fingerprint:
        raise InputError(
            f"the data set {spec.data.uri} was prepared with another tokenizer than that of {backbone.path}: "
            f"prepare it again with prepare.tokenizer.path={backbone.path} prepare.tokenizer.train_vocabulary=null"
        )
    return len(tokenizer)
