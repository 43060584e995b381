"""Arguments that several verbs of the command line take."""

import argparse
from collections.abc import Callable
from typing import Any

Verb = Callable[[argparse.Namespace], dict[str, Any]]


def add_verb(verbs: Any, name: str, run: Verb, help_text: str) -> argparse.ArgumentParser:
    """A verb that calls `run`, with what all verbs take."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser


def configured(parser: argparse.ArgumentParser) -> None:
    """Let a verb take a configuration and overrides."""
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def step(text: str) -> int | str:
    """A checkpoint's step, or `best`."""
    return text if text == "best" else count(text)


def count_or_none(text: str) -> int:
    """A whole number, 0 too."""
    return 0 if text == "0" else count(text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
