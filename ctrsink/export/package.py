"""A trained run becomes a folder that scores by itself: merged weights, configuration, tokenizer, model card."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from ctrsink import storage
from ctrsink.dataset.manifest import read_file
from ctrsink.errors import InputError
from ctrsink.export.card import CARD_NAME, model_card
from ctrsink.families.hf import CLASSES, ExportedConfig
from ctrsink.families.parameters import DTYPES
from ctrsink.families.registry import family_of, source_of
from ctrsink.folder import new_folder
from ctrsink.prepare.encoder import write_files
from ctrsink.serve.knowledge import FILE as KNOWLEDGE_NAME
from ctrsink.serve.knowledge import Knowledge
from ctrsink.tables.embedding import tables_of
from ctrsink.train.restore import TrainedRun, restore_run

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
log = logging.getLogger("ctrsink.export")


def export_run(run_dir: str, to: str, dtype: Literal["fp32", "bf16"] = "fp32", checkpoint: int | None = None) -> dict[str, Any]:
    """Write the model of the run in `run_dir` to the new folder `to`, local or s3://.

    LoRA is merged in fp32, then what the family narrows, a backbone, is cast to `dtype`; the rest stays fp32. `checkpoint` is the
    number of optimiser steps of the one to take, by default the latest whole one.

    Returns:
        `model` (the folder), `step`, `dtype`, `parameters`, `merged_layers` and the size in `bytes`.

    Raises:
        InputError: there is no such run or checkpoint, it gives no finite predictions, or `to` holds something already.
    """
    if storage.exists(to) and (storage.list_files(to) or storage.list_dirs(to)):
        raise InputError(f"{to} is not empty: choose a new folder for the exported model")
    run = restore_run(run_dir, checkpoint)
    _require_finite_weights(run)
    section, merged = family_of(run.spec.model.family).merged(run.model, run.spec.model)
    _require_predictions(run)
    knowledge = _knowledge(run)
    plain, items = knowledge.dump() if knowledge else (None, b"")
    config = _config(run, section, DTYPES[dtype], plain)
    weights = _weights(run, config, DTYPES[dtype])
    with _published(to) as folder:
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        for entry in run.dataset.manifest.tokenizer:
            name = Path(entry.path).name
            (folder / name).write_bytes(portable(name, read_file(run.dataset.uri, entry)))
        for entry in run.dataset.manifest.encoder.files if config.encoder and run.dataset.manifest.encoder else ():
            write_files(folder, {entry.path: read_file(run.dataset.uri, entry)})
        if knowledge:
            (folder / KNOWLEDGE_NAME).write_bytes(items)
        (folder / CARD_NAME).write_text(model_card(run, dtype), "utf-8")
        config.to_json_file(folder / CONFIG_NAME, use_diff=True)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    log.info("exported step %d of %s to %s", run.checkpoint.step, run_dir, to)
    return {
        "model": to,
        "step": run.checkpoint.step,
        "dtype": dtype,
        "parameters": sum(w.numel() for w in weights.values()),
        "merged_layers": merged,
        "bytes": size,
    }


def _require_finite_weights(run: TrainedRun) -> None:
    dead = next((name for name, value in run.checkpoint.parameters.items() if not value.isfinite().all()), None)
    dead = dead or next((name for name, table in tables_of(run.model).items() if not table.is_finite()), None)
    if dead is not None:
        raise InputError(_dead(run, f"its weights {dead} are not finite"))


def _require_predictions(run: TrainedRun) -> None:
    """Finite weights may be so large that what they compute is not."""
    source = source_of(run.dataset, "train", run.layout)
    batch = source.build(source.some())
    with torch.inference_mode():
        logits = run.model(batch, run.objective).logits
    assert logits is not None  # by restore_run
    if not logits.isfinite().all():
        raise InputError(_dead(run, "its predictions are not finite"))


def _dead(run: TrainedRun, why: str) -> str:
    return (
        f"the checkpoint of step {run.checkpoint.step} of {run.spec.run_dir} is no model: {why}; name another with --checkpoint"
    )


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


def _knowledge(run: TrainedRun) -> Knowledge | None:
    """What the model's signals need of items; None: nothing."""
    if not run.layout.events_of_signals:
        return None
    return Knowledge.of(run.dataset, "neighbours" in run.layout.needs, run.layout.columns)


def _config(run: TrainedRun, plain: dict[str, Any], dtype: torch.dtype, knowledge: dict[str, Any] | None) -> ExportedConfig:
    manifest = run.dataset.manifest
    config, model = CLASSES[run.spec.model.family]
    return config(
        architectures=[model.__name__],
        dtype=str(dtype).removeprefix("torch."),
        model=plain,
        facts=dataclasses.asdict(run.facts),
        objective=run.objective.model_dump(mode="json"),
        layout=dataclasses.asdict(run.layout),
        text=manifest.text.model_dump(mode="json"),
        prefix_tokens=list(manifest.prefix_tokens),
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        feedback_texts=list(manifest.feedback_texts) if "feedback" in run.layout.signals else None,
        knowledge=knowledge,
        encoder=manifest.encoder.model_dump(include={"max_tokens", "fingerprint"})
        if manifest.encoder and run.layout.needs_vectors
        else None,
    )


def _weights(run: TrainedRun, config: ExportedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors to store, by the names of the exported model; an empty one of it proves that each has its place."""
    family = family_of(run.spec.model.family)
    with torch.device("meta"):
        shell = CLASSES[run.spec.model.family][1](config)
    shell.ctr.load_state_dict(run.model.state_dict(), strict=True, assign=True)
    narrow = {f"ctr.{name}" for name in run.model.state_dict() if family.narrowed(name)}
    return {
        name: (value.to(dtype) if name in narrow and value.is_floating_point() else value).contiguous()
        for name, value in shell.state_dict().items()
    }


@contextmanager
def _published(to: str) -> Iterator[Path]:
    """A local folder to fill; it is at `to` when the block ends, and nothing is there when the block fails.

    On S3 the configuration goes last: without it a folder is no model.
    """
    if not storage.is_remote(to):
        with new_folder(Path(to.removeprefix("file://"))) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ctrsink-export-") as scratch:
        folder = Path(scratch)
        yield folder
        config = (folder / CONFIG_NAME).read_bytes()
        (folder / CONFIG_NAME).unlink()
        try:
            storage.upload_dir(folder, to)
            storage.write_bytes(storage.join(to, CONFIG_NAME), config)
        except BaseException:
            storage.delete(to)
            raise
