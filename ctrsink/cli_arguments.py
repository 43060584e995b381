"""Arguments that several verbs of the command line take."""

import argparse
from collections.abc import Callable
from typing import Any

from ctrsink.estimate.devices import GPUS

Verb = Callable[[argparse.Namespace], dict[str, Any]]


def add_verb(verbs: Any, name: str, run: Verb, help_text: str, quiet: bool = False) -> argparse.ArgumentParser:
    """A verb that calls `run`, with what all verbs take; `quiet`: what libraries say meanwhile is kept off the terminal."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(run=run, quiet=quiet)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    add_verbose(parser)
    return parser


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Before the verb or behind it."""
    shown = "show what libraries say, which else goes into a file"
    parser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=shown)


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


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0, and at most 1."""
    if (value := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1")
    return value


def node_counts(text: str) -> tuple[int, ...]:
    """`nodes=1,2,4`."""
    name, _, counts = text.partition("=")
    if name != "nodes" or not counts:
        raise argparse.ArgumentTypeError(f"{text}: write nodes=1,2,4")
    return tuple(count(number) for number in counts.split(","))


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where a plan is for."""
    parser.add_argument("--gpu", choices=sorted(GPUS), help="default: the CPU of this machine")
    parser.add_argument("--nodes", type=count, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=count, metavar="M", help="default: as many as runtime.workers in all")
    parser.add_argument("--utilisation", type=share, default=0.35, metavar="U", help="of the device's peak (default: 0.35)")
    parser.add_argument("--network", type=positive, default=400.0, metavar="GBIT", help="Gbit/s of a node (default: 400)")
    parser.add_argument("--price", type=positive, metavar="P", help="of a device for an hour")
    parser.add_argument("--sweep", type=node_counts, default=(), metavar="nodes=1,2,4", help="a row for each number of nodes")
