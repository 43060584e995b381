"""How a plain decoder is asked, as code that needs transformers alone."""

from ctrsink.config.data import TextSpec

_CODE = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()


def tokens(text, own=False):
    # What reads like a control token in an item's fields is letters like any others.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=not own)["input_ids"]


def item_tokens(item):
    return tokens(ITEM.format(**item))[:MOST]


def click_probability(history, candidate):
    ids = list(PREFIX)
    for behaviour in history[max(0, len(history) - NEWEST) :]:
        feedback = behaviour["feedback"]
        said = "" if feedback is None else FEEDBACK.format(feedback=feedback)
        ids += item_tokens(behaviour["item"]) + tokens(said + SEPARATOR, own=True)
    ids += item_tokens(candidate)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 0].double().sigmoid().item()


click_probability([{"item": {...}, "feedback": 4.0}], {...})
```

An item's fields must be strings, empty where a value is missing. Behaviours stand in order of time; one without feedback has
the separator alone. Each text is tokenised by itself: the tokens of the whole as one text may be others.
`ctrsink score --model path/to/this/folder` gives the same probabilities."""


def how_to_prompt(text: TextSpec, prefix: list[int], history: int) -> str:
    """Markdown: the prompt's form, by code.

    Args:
        prefix: tokens at the start.
        history: behaviours that training gave a target at most.
    """
    values = {
        "ITEM": text.item, "FEEDBACK": text.feedback, "SEPARATOR": text.separator, "MOST": text.max_item_tokens,
        "PREFIX": prefix, "NEWEST": history,
    }  # fmt: skip
    told = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return _CODE.replace('folder = "path/to/this/folder"\n', f'folder = "path/to/this/folder"\n{told}\n', 1)
