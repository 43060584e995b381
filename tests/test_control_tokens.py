"""What reads like a control token in a log or a request is letters; in templates and the prefix it is meant."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ctrsink.config.data import PrepareSpec, TokenizerSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.prepare import tokenize
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.encoder import Encoder
from ctrsink.serve import Scorer
from tests.encoder_fixtures import write_encoder
from tests.serving_fixtures import Prepared, run_spec, write_run
from tests.value_fixtures import log_rows, spec_for, write_jsonl

CONTROL = ["<s>", "</s>", "<pad>", "<mask>", "<|im_end|>"]
TITLES = ["Tea pot", "Great film</s>", "Great film<|im_end|>", "<s>Great film", "a <mask> b", "</s>"]


def byte_level() -> PreTrainedTokenizerBase:
    """As of a Llama: byte-level BPE that puts BOS before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TITLES * 4, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )


def pieces() -> PreTrainedTokenizerBase:
    """As of an XLM-R: control tokens are pieces of the vocabulary, and likelier than any."""
    letters = sorted(set("".join([*TITLES, *CONTROL])))
    vocabulary = [*((token, 0.0) for token in CONTROL), ("<unk>", 0.0), ("\u2581", -3.0), *((letter, -4.0) for letter in letters)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=len(CONTROL)))
    core.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mask>", "<|im_end|>"]})
    return tokenizer


def words() -> PreTrainedTokenizerBase:
    """Whole words, control tokens among them."""
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*CONTROL, "<unk>", "Tea", "pot", "film"])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mask>", "<|im_end|>"]})
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(number) for number in tokenizer.convert_tokens_to_ids(CONTROL)]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


@pytest.mark.parametrize("make", [byte_level, pieces, words])
def test_no_text_of_a_log_gives_a_control_token(make: Any) -> None:
    tokenizer = make()
    control = set(ids_of(tokenizer))
    texts = [*TITLES, *CONTROL, " ".join(CONTROL), "".join(CONTROL) * 2]
    for text, ids in zip(texts, tokenize.encode(tokenizer, texts), strict=True):
        assert ids
        assert not control & set(ids), text
    assert tokenize.encode_own(tokenizer, CONTROL) == [[number] for number in ids_of(tokenizer)]
    # What holds none is as it always was, one by one or together.
    plain = ["Tea pot", "film"]
    assert tokenize.encode(tokenizer, plain) == tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert tokenize.encode(tokenizer, texts) == [tokenize.encode(tokenizer, [text])[0] for text in texts]


def test_letters_of_a_control_token_are_the_tokens_of_these_letters() -> None:
    tokenizer = byte_level()
    (ids,) = tokenize.encode(tokenizer, ["Great film</s>"])
    assert tokenizer.decode(ids) == "Great film</s>"
    assert ids == tokenizer("Great film</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]


def saved(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def shop(folder: Path, path: str, **text: Any) -> PrepareSpec:
    """A log over TITLES, with the tokenizer in the folder `path`."""
    write_jsonl(folder / "items.jsonl", {"item": [f"i{n}" for n in range(6)], "title": TITLES})
    log = write_jsonl(folder / "log.jsonl", log_rows(["u0", "u1", "u2"]))
    spec = spec_for(log, folder / "items.jsonl", **text)
    return spec.model_copy(update={"tokenizer": TokenizerSpec(path=path)})


def item_tokens(uri: str) -> dict[str, list[int]]:
    """By the item's title."""
    dataset, found = Dataset(uri), {}
    titles = dataset.read_items()["title"].to_pylist()
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.shard(number)
        for item, text in zip(shard.items.tolist(), shard.texts.tolist(), strict=True):
            a, b = shard.tokens.offsets[text : text + 2]
            found[titles[item]] = shard.tokens.values[a:b].tolist()
    return found


def test_templates_and_prefix_keep_their_control_tokens_and_fields_have_none(tmp_path: Path) -> None:
    tokenizer = byte_level()
    bos, eos, pad, _, end = ids_of(tokenizer)
    text = {"item": "<|im_end|>{title}, <pad>ok", "separator": "</s>", "prefix": "<s>Likes</s>", "max_item_tokens": 40}
    manifest = prepare(shop(tmp_path, saved(tmp_path / "tokenizer", tokenizer), **text), str(tmp_path / "data"))
    (likes,) = tokenize.encode(tokenizer, ["Likes"])
    assert list(manifest.prefix_tokens) == [bos, *likes, eos]
    assert all(ids[-1] == eos for ids in manifest.feedback_tokens)
    found = item_tokens(str(tmp_path / "data"))
    assert set(found) == set(TITLES)
    for title, ids in found.items():
        before, behind = tokenize.encode(tokenizer, [f"{title}, ", "ok"])
        assert ids == [end, *before, pad, *behind]


def test_control_tokens_in_templates_take_the_space_that_they_take_elsewhere() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)]})
    whole = tokenize.encode_own(tokenizer, ["Tea pot <|end|>\nGreat"])
    items = pa.table({"title": ["Tea pot"]})
    assert tokenize.encode_items(tokenizer, "{title} <|end|>\nGreat", items, ["Tea pot <|end|>\nGreat"]) == whole


@pytest.mark.parametrize(
    ("prefix", "count"), [("", 1), ("Likes", 1), ("<s>", 1), ("<s>Likes", 1), ("<s><s>", 2), ("Likes<s>", 2)]
)
def test_bos_is_not_doubled(prefix: str, count: int) -> None:
    tokenizer = byte_level()
    ids = tokenize.prefix_tokens(tokenizer, prefix)
    assert ids[0] == 0
    assert ids.count(0) == count


def test_requests_are_read_as_the_log_was(tmp_path: Path) -> None:
    spec = shop(tmp_path, saved(tmp_path / "tokenizer", byte_level()), item="<s>{title}")
    prepare(spec, str(tmp_path / "data"))
    run = run_spec(Prepared(str(tmp_path / "data"), spec), str(tmp_path / "run"), history=8)
    write_run(run)
    export_run(run.run_dir, str(tmp_path / "model"))
    scorer, seen = Scorer.load(str(tmp_path / "model")), []
    scorer.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    items = [{"title": title} for title in TITLES]
    history = [{"item": item, "feedback": 1, "timestamp": n} for n, item in enumerate(items)]
    scorer.score({"history": history, "candidates": items, "timestamp": 9})
    expected = item_tokens(str(tmp_path / "data"))
    text = json.dumps(seen[0].inputs["input_ids"].tolist())[1:-1]
    for ids in expected.values():
        assert json.dumps(ids)[1:-1] in text


def test_the_item_encoder_reads_control_tokens_as_letters(tmp_path: Path) -> None:
    encoder = Encoder(write_encoder(tmp_path / "encoder"), 32, "tiny")
    texts = ["a film", "a film[SEP]", "[CLS]a film", "a [PAD] film", "[MASK]"]
    vectors = encoder.encode(texts)
    given: list[list[int]] = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    for text in texts:
        encoder.encode([text])
    cls, sep, pad = (encoder.tokenizer.convert_tokens_to_ids(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    for ids in given:
        assert (ids[0], ids[-1]) == (cls, sep)
        assert not {cls, sep, pad} & set(ids[1:-1])
    assert len({tuple(vector) for vector in vectors.tolist()}) == len(texts)


def test_the_fingerprint_tells_tokenizers_apart_by_their_control_tokens() -> None:
    first, second = byte_level(), byte_level()
    assert tokenize.fingerprint(first) == tokenize.fingerprint(second)
    second.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>", lstrip=True, special=True)]})
    assert tokenize.fingerprint(first) != tokenize.fingerprint(second)


def test_a_data_set_and_a_model_from_before_are_refused(tmp_path: Path) -> None:
    spec = shop(tmp_path, saved(tmp_path / "tokenizer", byte_level()))
    prepare(spec, str(tmp_path / "data"))
    manifest = tmp_path / "data" / "manifest.json"
    run = run_spec(Prepared(str(tmp_path / "data"), spec), str(tmp_path / "run"))
    write_run(run)
    export_run(run.run_dir, str(tmp_path / "model"))
    manifest.write_text(manifest.read_text().replace("ctrsink-dataset/3", "ctrsink-dataset/2"))
    for use in (lambda: read_manifest(str(tmp_path / "data")), lambda: append(spec, str(tmp_path / "data"))):
        with pytest.raises(InputError, match=r"is of format ctrsink-dataset/2, this version reads ctrsink-dataset/3: prepare"):
            use()
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("ctrsink-model/4", "ctrsink-model/1"))
    with pytest.raises(InputError, match=r"has the format ctrsink-model/1, this version reads ctrsink-model/4"):
        Scorer.load(str(tmp_path / "model"))
