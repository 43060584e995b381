"""The tokenizer of a data set: trained on its texts or taken from a model, kept beside the shards, known by a fingerprint."""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctrsink import storage
from ctrsink.config.data import TokenizerSpec
from ctrsink.data.manifest import Manifest, read_file, read_manifest
from ctrsink.errors import InputError

FOLDER = "tokenizer"
LONGEST_WORD = 4096
_WORD = re.compile(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+")  # letters, digits, other signs, blanks
# Texts whose ids tell apart tokenizers of equal vocabulary but other rules: case, spaces, digits, accents, other scripts.
_PROBES = (
    "The quick brown Fox jumps over 13 lazy dogs.",
    "  two leading spaces, a\ttab and\n\na blank line ",
    "1234567890 3.5 -0.25 1e-3",
    "Misérables, Les (1995) — naïve café",
    "星際大戰 Звёздные войны حرب 🎬",
    "don't won't I'LL",
)


def until_endless_word(text: str) -> str:
    """`text` up to LONGEST_WORD signs of its first word that is longer: training takes time in the square of the longest word.

    A word is what the byte-level splitter takes for one.
    """
    if len(text) > LONGEST_WORD:
        for word in _WORD.finditer(text):
            if word.end() - word.start() > LONGEST_WORD:
                return text[: word.start() + LONGEST_WORD]
    return text


def make_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `spec` names, or train one on `texts`.

    Raises:
        InputError: there is no such tokenizer, or it has no fast form.
    """
    if spec.train_vocabulary is not None:
        return _train(spec.train_vocabulary, texts)
    assert spec.path is not None
    if not storage.is_remote(spec.path):
        return _load(spec.path, spec.path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            storage.download_dir(spec.path, folder)
        except FileNotFoundError:
            raise InputError(f"tokenizer.path {spec.path} does not exist") from None
        return _load(folder, spec.path)


def load_tokenizer(uri: str, manifest: Manifest | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the data set in the folder `uri`, each of its files checked against the manifest.

    Raises:
        InputError: the data set, or a file of its tokenizer, is missing or altered.
    """
    manifest = manifest or read_manifest(uri)
    with tempfile.TemporaryDirectory() as folder:
        for entry in manifest.tokenizer:
            (Path(folder) / Path(entry.path).name).write_bytes(read_file(uri, entry))
        return _load(folder, storage.join(uri, FOLDER))


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that `load_tokenizer` needs, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]  # pyright: ignore[reportReturnType]


def prefix_tokens(tokenizer: PreTrainedTokenizerBase, prefix: str) -> list[int]:
    """The start of every sequence: BOS if the tokenizer puts one by itself, then the tokens of `prefix`."""
    start: list[int] = tokenizer("a")["input_ids"][:1]  # pyright: ignore[reportAssignmentType, reportIndexIssue]
    has_bos = tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id]
    return (start if has_bos else []) + encode(tokenizer, [prefix])[0]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and the ids of fixed texts: equal exactly where texts become equal tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    content = json.dumps([vocabulary, encode(tokenizer, list(_PROBES))], ensure_ascii=True, separators=(",", ":"))
    return storage.sha256(content.encode())


def _train(vocabulary: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def _load(folder: str, name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load the tokenizer {name}: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {name} has no fast form (tokenizer.json): choose a model that has one")
    return tokenizer
