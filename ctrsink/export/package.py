"""A trained run becomes a folder that scores by itself: weights, configuration, tokenizer, model card."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any, Literal

from ctrsink.dataset.manifest import read_file
from ctrsink.errors import InputError
from ctrsink.export.card import CARD_NAME, model_card
from ctrsink.export.forms import FORMS, Written
from ctrsink.export.parity import dead, require_parity, sample, trained_logits
from ctrsink.export.published import CONFIG_NAME, published, require_free
from ctrsink.families.registry import family_of
from ctrsink.prepare.encoder import write_files
from ctrsink.serve.knowledge import FILE as KNOWLEDGE_NAME
from ctrsink.tables.embedding import tables_of
from ctrsink.train.host_memory import giving_back
from ctrsink.train.restore import TrainedRun, restore_run

log = logging.getLogger("ctrsink.export")


def export_run(
    run_dir: str,
    to: str,
    dtype: Literal["fp32", "bf16"] = "fp32",
    checkpoint: int | None = None,
    form: Literal["merged", "adapter", "plain"] = "merged",
) -> dict[str, Any]:
    """Write the model of the run in `run_dir` to the new folder `to`, local or s3://.

    It is loaded from there before it is published, and must compute what the run's model computes. One copy of the weights is in
    memory at a time, as far as they are not mapped from files.

    Args:
        dtype: of what the family narrows, a backbone; the rest stays fp32.
        checkpoint: number of optimiser steps of the one to take, by default the latest whole one.
        form: `merged`: LoRA is merged, in fp32, and the folder stands alone. `adapter`: without the base's weights.
            `plain`: LoRA is merged, and the folder is a model of transformers' own.

    Returns:
        `model` (the folder), `form`, `step`, `dtype`, `parameters`, `merged_layers`, the size in `bytes` and `difference`, the
        greatest one of a logit x as a share of 1 + |x|.

    Raises:
        InputError: there is no such run or checkpoint, it gives no finite predictions, it has no such form, `to` holds something
            already, or what was written computes something else.
    """
    require_free(to)
    with giving_back():
        return _exported(run_dir, to, dtype, checkpoint, form)


def _exported(run_dir: str, to: str, dtype: str, checkpoint: int | None, form: str) -> dict[str, Any]:
    run = restore_run(run_dir, checkpoint)
    _require_finite_weights(run)
    batches = sample(run)
    expected = trained_logits(run, batches)
    with published(to) as folder:
        written = FORMS[form](run, folder, dtype)
        _write_beside(run, written, folder)
        # Before the model is loaded that was written: memory holds one of them, and maps the files of one.
        bare = dataclasses.replace(run.checkpoint, parameters={})
        run = dataclasses.replace(run, model=_shape(run), checkpoint=bare)
        difference = require_parity(written.load(str(folder)), batches, expected, dtype)
        facts = [*written.facts, _agreement(len(batches), difference, dtype)]
        (folder / CARD_NAME).write_text(model_card(run, facts, written.use), "utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    log.info("exported step %d of %s to %s", run.checkpoint.step, run_dir, to)
    return {
        "model": to,
        "form": form,
        "step": run.checkpoint.step,
        "dtype": dtype,
        "parameters": written.parameters,
        "merged_layers": written.merged_layers,
        "bytes": size,
        "difference": difference,
    }


def _shape(run: TrainedRun) -> Any:
    """The run's model without its memory."""
    family = family_of(run.spec.model.family)
    return family.shape(family.portable(run.spec.model), run.facts)


def _agreement(sequences: int, difference: float, dtype: str) -> str:
    return (
        f"On {sequences} sequences of the training data the files compute the logits of the model that was trained, with weights "
        f"in {dtype} to within {difference:.1e} of 1 + |logit|."
    )


def _require_finite_weights(run: TrainedRun) -> None:
    wrong = next((name for name, value in run.checkpoint.parameters.items() if not value.isfinite().all()), None)
    wrong = wrong or next((name for name, table in tables_of(run.model).items() if not table.is_finite()), None)
    if wrong is not None:
        raise InputError(dead(run, f"its weights {wrong} are not finite"))


def _write_beside(run: TrainedRun, written: Written, folder: Path) -> None:
    """What a request needs beside the weights: tokenizer, encoder, what is known of items; and the configuration."""
    manifest = run.dataset.manifest
    for entry in manifest.tokenizer:
        name = Path(entry.path).name
        (folder / name).write_bytes(portable(name, read_file(run.dataset.uri, entry)))
    for entry in manifest.encoder.files if run.layout.needs_vectors and manifest.encoder else ():
        write_files(folder, {entry.path: read_file(run.dataset.uri, entry)})
    if written.items is not None:
        (folder / KNOWLEDGE_NAME).write_bytes(written.items)
    (folder / CONFIG_NAME).write_text(json.dumps(written.config, indent=2, sort_keys=True) + "\n")


def portable(name: str, content: bytes) -> bytes:
    """A tokenizer's file such as transformers 4 loads too: 5 has another name for its general class and for further tokens."""
    if name != "tokenizer_config.json":
        return content
    fields: dict[str, Any] = json.loads(content)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return json.dumps(fields, indent=2, ensure_ascii=False).encode()
