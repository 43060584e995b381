"""Write docs/cli.md from the parser of the command line: `python docs/make_cli.py [FILE]`."""

import argparse
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ctrsink.cli import _parser

_HEAD = """\
# Command line

Every verb, its options and what they say. This page is made from the code by `docs/make_cli.py`; do not edit it by hand.

`ctrsink VERB --help` prints the same. Overrides (`section.key=value`) change single keys of
[the configuration](configuration.md). Every verb takes `--json` besides: the last line of stdout is then one JSON object, for
errors too; and `--verbose`, which shows [what libraries say](watching.md#on-the-terminal). What it ends with:
[exit codes](architecture.md#exit-codes).

| verb | what it does |
| --- | --- |
"""


def page() -> str:
    """The whole page, in Markdown."""
    verbs = list(_verbs(_parser(), ""))
    rows = [f"| [`{name}`](#{_anchor(name)}) | {_cell(verb.description)} |" for name, verb in verbs]
    return "\n".join([_HEAD + "\n".join(rows), "", *(_section(name, verb) for name, verb in verbs)])


def _verbs(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb that does something, in the order in which it is declared."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, verb in group.choices.items():
            yield from _verbs(verb, f"{name} {word}".strip())


def _section(name: str, verb: argparse.ArgumentParser) -> str:
    everywhere = ("help", "json", "verbose")
    taken = [action for action in verb._actions if action.dest not in everywhere and action.help != argparse.SUPPRESS]
    parts = [f"ctrsink {name}", *(_usage(action) for action in taken)]
    # Breaks are for between arguments, not within one: no line ends at a space that is none to textwrap.
    line = " ".join(part.replace(" ", "\xa0") for part in parts)
    usage = textwrap.fill(line, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False).replace(
        "\xa0", " "
    )
    # A bar in code ends a cell on a code host, and a backslash before it is shown by the site.
    rows = [f"| `{_form(action).replace('|', ' or ')}` | {_meaning(action)} |" for action in taken]
    table = "\n".join(["| argument | meaning |", "| --- | --- |", *rows])
    return f"## `{name}`\n\n{_sentence(verb.description)}\n\n```text\n{usage}\n```\n\n{table}\n"


def _usage(action: argparse.Action) -> str:
    form = _form(action)
    if action.option_strings:
        return form if action.required else f"[{form}]"
    return f"[{form} ...]" if action.nargs == "*" else f"{form} ..." if action.nargs == "+" else form


def _form(action: argparse.Action) -> str:
    """An option with its value, or the name of what stands without one."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if not action.option_strings:
        return str(value)
    more = f" [{value} ...]" if action.nargs == "+" else ""
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {value}{more}")


def _meaning(action: argparse.Action) -> str:
    told = _cell((action.help or "") % vars(action))
    if action.dest == "overrides":
        told = told or "changes a key of the configuration"
    if action.required and action.option_strings:
        told = f"required; {told}" if told else "required"
    default = action.default
    if "default" not in told and action.option_strings and action.nargs != 0 and default is not None and default != ():
        words = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        told = f"{told} (default: {words})" if told else f"default: {words}"
    return told


def _sentence(text: str | None) -> str:
    return f"{(text or '')[:1].upper()}{(text or '')[1:]}."


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # a default of one option, where it is set
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("cli.md")
    target.write_text(page(), "utf-8")
