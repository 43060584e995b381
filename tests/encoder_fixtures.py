"""A tiny text encoder of random weights, in the form in which sentence-transformers publishes them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789()-.,'\"éè"


def write_encoder(folder: Path, seed: int = 0, pooling: str | None = "mean_tokens") -> Path:
    """Write a BERT of two layers that reads characters; `pooling` None leaves out what sentence-transformers adds."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *_CHARACTERS]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        max_position_embeddings=64,
        initializer_range=0.5,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", "Normalize"]
        modules = [{"idx": i, "name": str(i), "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    return folder
