"""A text encoder: the token states of any Hugging Face model, pooled to one vector of length 1 per text."""

import json
import tempfile
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from ctrsink import storage
from ctrsink.config.data import EncoderSpec
from ctrsink.errors import InputError
from ctrsink.prepare.tokenize import encode

FOLDER = "encoder"
BATCH_SIZE = 32  # texts of like length
_READING = "control tokens in texts are letters"  # another way to read a text gives other vectors
# What an encoder needs, and no weights in pickle or another library's format.
_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "*.model",
    "modules.json", "1_Pooling/config.json",
)  # fmt: skip


class Encoder:
    """Texts -> vectors.

    Args:
        folder: local folder of the encoder.
        max_tokens: texts are cut to this many.
        name: of the encoder, for errors.
        device: where it runs; left out, a GPU where the process sees one.

    Raises:
        InputError: it is no encoder that can be used here, with safetensors and without code of its own.
    """

    def __init__(self, folder: Path, max_tokens: int, name: str, device: str | None = None) -> None:
        self.max_tokens, self.name = max_tokens, name
        self.pooling = _pooling(folder, name)
        loading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **loading)
            model, found = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **loading
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the encoder {name}: {' '.join(str(error).split())[:200]}") from None
        # An encoder is often published without the pooler of its class, which is not used here.
        missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
        if missing or found["mismatched_keys"]:
            lacking = missing or sorted(map(str, found["mismatched_keys"]))
            raise InputError(f"the weights of the encoder {name} do not fit its config.json: {lacking[0]} is missing or another")
        if model.config.is_encoder_decoder:
            raise InputError(f"the encoder {name} is an encoder with a decoder: choose one without")
        positions = getattr(model.config, "max_position_embeddings", None) or max_tokens
        if max_tokens > min(positions, self.tokenizer.model_max_length):
            limit = min(positions, self.tokenizer.model_max_length)
            raise InputError(f"prepare.encoder.max_tokens {max_tokens} is more than the {limit} that the encoder {name} reads")
        self.width = int(model.config.hidden_size)
        self.model = model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        """Vectors of length 1, float16 [N, width]; zeros where a text has no token.

        Raises:
            InputError: a vector is not finite.
        """
        out = np.zeros((len(texts), self.width), np.float16)
        ids = encode(self.tokenizer, texts, truncation=True, max_length=self.max_tokens)
        lengths = np.array([len(row) for row in ids], np.int64)
        order = (-lengths).argsort(kind="stable")[: int((lengths > 0).sum())]
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            tokens = np.full((len(rows), lengths[rows[0]]), self.tokenizer.pad_token_id or 0)
            for place, row in enumerate(rows.tolist()):
                tokens[place, : lengths[row]] = ids[row]
            mask = np.arange(tokens.shape[1]) < lengths[rows, None]
            vectors = self._pooled(torch.from_numpy(tokens), torch.from_numpy(mask))
            if not vectors.isfinite().all():
                raise InputError(f"the encoder {self.name} gives vectors that are not finite: choose another prepare.encoder")
            out[rows] = vectors.half().cpu().numpy()
        return out

    def _pooled(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens, mask = tokens.to(self.model.device), mask.to(self.model.device)
        states = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(states[:, 0] if self.pooling == "cls" else mean, dim=1)


def encoder_files(spec: EncoderSpec) -> dict[str, bytes]:
    """The files of the encoder that `spec` names, by their paths in its folder.

    Raises:
        InputError: there is no such encoder, or it has no weights in safetensors.
    """
    with tempfile.TemporaryDirectory(prefix="ctrsink-encoder-") as scratch:
        folder = Path(spec.path)
        try:
            if storage.is_remote(spec.path):
                folder = Path(scratch)
                storage.download_dir(spec.path, folder)
            elif not folder.is_dir():
                folder = Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=list(_FILES)))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"prepare.encoder.path {spec.path} is no folder, and not to be had from the hub: {reason}") from None
        paths = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    if "config.json" not in found or not any(name.endswith(".safetensors") for name in found):
        raise InputError(f"prepare.encoder.path {spec.path} lacks config.json or weights in safetensors: choose another encoder")
    return found


def fingerprint(hashes: dict[str, str], max_tokens: int) -> str:
    """Equal exactly where texts become equal vectors, up to rounding; `hashes` are the sha256 of the files by path."""
    return storage.sha256(json.dumps([_READING, sorted(hashes.items()), max_tokens]).encode())


def folder_fingerprint(folder: Path, max_tokens: int) -> str:
    """The fingerprint of the encoder in a local folder that holds nothing else."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return fingerprint({path.relative_to(folder).as_posix(): storage.sha256(path.read_bytes()) for path in paths}, max_tokens)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their paths below `folder`.

    Raises:
        InputError: a path leads out of it.
    """
    for name, content in files.items():
        path = folder / PurePosixPath(storage.require_below(name, str(folder)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@lru_cache(maxsize=1)
def load_encoder(uri: str, max_tokens: int, name: str, fingerprint: str) -> Encoder:
    """The encoder with that fingerprint in a folder, local or s3://; kept for the next call."""
    if not storage.is_remote(uri):
        return Encoder(Path(uri.removeprefix("file://")), max_tokens, name)
    with tempfile.TemporaryDirectory(prefix="ctrsink-encoder-") as folder:
        storage.download_dir(uri, folder)
        return Encoder(Path(folder), max_tokens, name)


def _pooling(folder: Path, name: str) -> Literal["mean", "cls"]:
    """How sentence-transformers pools; the mean where the folder says nothing."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes()) if (folder / "modules.json").exists() else []
        kinds = {str(module["type"]).rpartition(".")[2] for module in modules}
        path = folder / "1_Pooling" / "config.json"
        config = json.loads(path.read_bytes()) if path.exists() else {}
        modes = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"the encoder {name} has a damaged modules.json or 1_Pooling/config.json") from None
    others = sorted(kinds - {"Transformer", "Pooling", "Normalize"})
    if others:
        raise InputError(f"the encoder {name} has a module {others[0]}, which is not computed here: choose another")
    if modes <= {"pooling_mode_mean_tokens"}:
        return "mean"
    if modes == {"pooling_mode_cls_token"}:
        return "cls"
    raise InputError(f"the encoder {name} pools by {', '.join(sorted(modes))}: choose one that takes the mean or cls")
