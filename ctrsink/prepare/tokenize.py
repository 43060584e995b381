"""The tokenizer of a data set: trained on its texts or taken from a model, kept beside the shards, known by a fingerprint."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctrsink import storage
from ctrsink.config.data import TokenizerSpec
from ctrsink.dataset.manifest import Manifest, read_file, read_manifest
from ctrsink.errors import InputError
from ctrsink.prepare.render import item_texts

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


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> list[list[int]]:
    """Token ids of texts from a log or a request: what reads like a control token there is letters like any others.

    `options` are the tokenizer's own; without any, no special tokens are added.
    """
    if not texts:
        return []
    options = {"split_special_tokens": True, "return_special_tokens_mask": True} | (options or {"add_special_tokens": False})
    control = _control_ids(tokenizer)
    found: Any = tokenizer(texts, return_attention_mask=False, **options)
    return [
        ids if control.isdisjoint(ids) or not _foreign(control, ids, added) else _encode_apart(tokenizer, text, control, options)
        for text, ids, added in zip(texts, found["input_ids"], found["special_tokens_mask"], strict=True)
    ]


def encode_own(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts from the configuration, without special tokens but for those that stand in them, which are meant."""
    if not texts:
        return []
    found: Any = tokenizer(texts, add_special_tokens=False, split_special_tokens=False, return_attention_mask=False)
    return found["input_ids"]


def encode_items(tokenizer: PreTrainedTokenizerBase, template: str, items: pa.Table, texts: list[str]) -> list[list[int]]:
    """Token ids of the items' `texts`, which `template` gives: its own control tokens are meant, those in fields are letters."""
    pieces = list(_pieces(tokenizer, template))
    if len(pieces) == 1:
        return encode(tokenizer, texts)
    found: list[list[int]] = [[] for _ in texts]
    for piece, control in pieces:
        rendered = encode(tokenizer, item_texts(piece, items)) if piece else [[]] * len(texts)
        for ids, more in zip(found, rendered, strict=True):
            ids += [*more, *control]
    return found


def has_control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether control tokens stand in an item's template itself."""
    return len(list(_pieces(tokenizer, template))) > 1


def prefix_tokens(tokenizer: PreTrainedTokenizerBase, prefix: str) -> list[int]:
    """The start of every sequence: BOS if the tokenizer puts one by itself and `prefix` does not, then the tokens of `prefix`."""
    start: list[int] = tokenizer("a")["input_ids"][:1]  # pyright: ignore[reportAssignmentType, reportIndexIssue]
    ids = encode_own(tokenizer, [prefix])[0]
    needs_bos = tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] != ids[:1]
    return (start if needs_bos else []) + ids


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and the ids of fixed texts and control tokens: equal exactly where texts become equal tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    control = [f"a {token} b" for token in sorted(_control_tokens(tokenizer))]
    ids = [encode(tokenizer, [*_PROBES, *control]), encode_own(tokenizer, control)]
    content = json.dumps([vocabulary, *ids], ensure_ascii=True, separators=(",", ":"))
    return storage.sha256(content.encode())


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Those with a meaning of their own, by their text; `AddedToken` and id."""
    return {token.content: (token, number) for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of control tokens that no text of letters gives; what is unknown may give the token of that."""
    ids = {number for _, number in _control_tokens(tokenizer).values()}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    unknown: Any = tokenizer.unk_token_id
    return ids if unknown in [getattr(tokenizer, name) for name in names] else ids - {unknown}


def _foreign(control: set[int], ids: list[int], added: list[int]) -> list[int]:
    """Places of control tokens that the tokenizer did not add itself."""
    return [place for place, (token, own) in enumerate(zip(ids, added, strict=True)) if token in control and not own]


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str, control: set[int], options: dict[str, Any]) -> list[int]:
    """For vocabularies of words or pieces, which hold control tokens as some of them: a space is put into each that is found."""
    found: Any = None
    places: list[int] = []
    for _ in range(4):
        found = tokenizer(text, return_offsets_mapping=True, **options)
        places = _foreign(control, found["input_ids"], found["special_tokens_mask"])
        if not places:
            break
        for place in reversed(places):
            cut = found["offset_mapping"][place][0] + 1
            text = f"{text[:cut]} {text[cut:]}"
    return [token for place, token in enumerate(found["input_ids"]) if place not in places]


def _pieces(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[tuple[str, list[int]]]:
    """A template cut at the control tokens in it: what stands before each, and its id; at last what stands behind them."""
    control, space = _control_tokens(tokenizer), r"\s*"
    patterns = [
        f"{space * token.lstrip}({re.escape(content)}){space * token.rstrip}"
        for content, (token, _) in sorted(control.items(), key=lambda entry: -len(entry[0]))
    ]
    parts = [part for part in re.split("|".join(patterns), template) if part is not None] if patterns else [template]
    for piece, token in zip_longest(parts[::2], parts[1::2]):
        yield piece, [] if token is None else [control[token][1]]


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
