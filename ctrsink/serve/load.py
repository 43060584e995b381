"""An exported folder becomes a model and its tokenizer, checked: a folder that would score wrongly is refused."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ctrsink import storage
from ctrsink.config.data import TextSpec
from ctrsink.config.explain import explain
from ctrsink.config.model import ModelSpec
from ctrsink.config.stages import Objective
from ctrsink.config.tree import shown
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError, first_line
from ctrsink.families.adapter import Base
from ctrsink.families.facts import Facts
from ctrsink.families.hf import CLASSES, FORMAT, ExportedModel, model_type_of, name_of
from ctrsink.families.registry import FAMILIES
from ctrsink.prepare.encoder import FOLDER, Encoder, folder_fingerprint
from ctrsink.prepare.tokenize import fingerprint
from ctrsink.serve.knowledge import FILE, Knowledge

_NEEDED = ("family", "model", "facts", "objective", "layout", "text", "prefix_tokens", "tokenizer_fingerprint")
_SECTIONS: dict[str, Any] = {
    "model": ModelSpec,
    "facts": Facts,
    "objective": Objective,
    "layout": Layout,
    "text": TextSpec,
    "prefix_tokens": list[int],
    "tokenizer_fingerprint": str,
    "feedback_texts": list[str],
    "knowledge": dict[str, Any],
    "encoder": dict[str, Any],
    "names": dict[str, str],
    "base": Base,
}
_FAMILIES = {kind: family for family in FAMILIES for kind in (model_type_of(family), name_of(family))}


@dataclass(frozen=True)
class Loaded:
    """All that scoring needs."""

    model: ExportedModel
    """In evaluation mode."""
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None
    """That of items' texts, where sequences depend on their vectors."""
    knowledge: Knowledge | None
    """What is known of items, where signals depend on it."""


def load_model(uri: str, device: str = "cpu", base: str | None = None) -> Loaded:
    """The model in the folder `uri`, local or s3://.

    Args:
        base: local folder of an adapter's base; by default where the adapter says, in a folder or in the Hugging Face cache.

    Raises:
        InputError: `uri` holds no exported model, one of another format, or one that is damaged; or an adapter whose base is not
            to be had, or another; or there is no such device.
    """
    with local_copy(uri) as folder:
        return load_folder(uri, folder, device, base)


def load_folder(uri: str, folder: Path, device: str = "cpu", base: str | None = None) -> Loaded:
    """As `load_model`, where a copy of `uri` lies in the local `folder`."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no GPU here: leave it out, or install a torch for CUDA")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: torch cannot use it ({first_line(error)}): leave it out") from None
    config = _read_config(uri, folder)
    try:
        model = _model(uri, folder, config, base)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, re.error, SafetensorError) as error:
        raise InputError(f"the model {uri} is damaged ({first_line(error)}): export it again") from None
    encoder = _encoder(uri, folder, model.config.encoder, device)
    knowledge = _knowledge(uri, folder, model.config.knowledge)
    if fingerprint(tokenizer) != model.config.tokenizer_fingerprint:
        raise InputError(f"the tokenizer in {uri} is not the one the model was trained with: export it again")
    model.to(device)  # pyright: ignore[reportArgumentType]
    return Loaded(model.eval(), tokenizer, encoder, knowledge)


def _model(uri: str, folder: Path, plain: dict[str, Any], base: str | None) -> ExportedModel:
    config_class, model_class = CLASSES[_FAMILIES[plain["model_type"]]]
    config = config_class.from_dict(plain)
    if config.base is not None:
        return model_class.from_pretrained(folder, config=config, base=base)
    if base is not None:
        raise InputError(f"{uri} holds all its weights, and is no adapter: leave out --base")
    model, found = model_class.from_pretrained(
        folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            name = sorted(map(str, found[kind]))[0]
            raise InputError(f"the weights of the model {uri} do not fit its configuration ({kind} {name}): export it again")
    return model


def _knowledge(uri: str, folder: Path, plain: dict[str, Any] | None) -> Knowledge | None:
    if plain is None:
        return None
    try:
        return Knowledge.load(plain, (folder / FILE).read_bytes())
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{uri}/{FILE} is missing or damaged ({first_line(error)}): export the model again") from None


def _encoder(uri: str, folder: Path, entry: dict[str, Any] | None, device: str) -> Encoder | None:
    """The encoder in the model's folder, which must be the one that its data set was prepared with."""
    if entry is None:
        return None
    if folder_fingerprint(folder / FOLDER, entry["max_tokens"]) != entry["fingerprint"]:
        raise InputError(f"the encoder in {uri} is not the one the model was trained with: export it again")
    return Encoder(folder / FOLDER, entry["max_tokens"], f"{uri}/{FOLDER}", device)


def _read_config(uri: str, folder: Path) -> dict[str, Any]:
    """The configuration, checked; of a plain decoder what stands in it under our name."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise InputError(f"{uri} holds no model: write one there with `ctrsink export`") from None
    except ValueError:
        raise InputError(f"{uri}/config.json is damaged: export the model again") from None
    if isinstance(config, dict):
        config = config.get("ctrsink", config)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _FAMILIES:
        raise InputError(f"{uri} holds a model of type {kind}, not one that `ctrsink export` wrote")
    if config.get("format") != FORMAT:
        raise InputError(f"{uri} has the format {config.get('format')}, this version reads {FORMAT}: export the model again")
    if (problem := _problem(config, _FAMILIES[kind])) is not None:
        raise InputError(f"{uri}/config.json is damaged ({problem}): export the model again")
    return config


def _problem(config: dict[str, Any], family: str) -> str | None:
    """What in an exported configuration nothing could have written there; None where all is well."""
    if unknown := sorted(config.keys() - CLASSES[family][0]().to_dict().keys()):
        return f"unknown key {shown(unknown[0])}"
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        return f"missing key {missing[0]}"
    for name, kind in _SECTIONS.items():
        if config.get(name) is None:
            continue
        try:
            TypeAdapter(kind).validate_python(config[name])
        except ValidationError as error:
            return f"{name}: {explain(error, kind)}"
    if unknown := sorted(config["layout"].keys() - {field.name for field in fields(Layout)}):
        return f"unknown key layout.{shown(unknown[0])}"
    if not config["family"] == config["model"].get("family") == config["layout"]["family"] == family:
        return f"its parts are of different families, model_type is {config['model_type']}"
    return None


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The folder `uri` itself, or a copy of one on S3 that lasts as long as the block."""
    if not storage.is_remote(uri):
        yield Path(uri.removeprefix("file://"))
        return
    with tempfile.TemporaryDirectory(prefix="ctrsink-model-") as folder:
        try:
            storage.download_dir(uri, folder)
        except FileNotFoundError:
            raise InputError(f"{uri} holds no model: write one there with `ctrsink export`") from None
        yield Path(folder)
