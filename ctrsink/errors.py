"""The failures a user can act on; the command line turns them into an exit code."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """What the user gave cannot be used: a file, a row, a config key, a credential (exit code 2).

    The message is one line that names the thing and says what to do.
    """


class StorageUnavailable(InputError):
    """A place of the user's cannot be reached now: an outage, expired credentials, a refused access.

    Once that is mended, what was done before is still of use; after any other InputError it may not be.
    """


class RunError(Exception):
    """The work itself failed although the input was good (exit code 1)."""


class Diverged(RunError):
    """Losses, gradients, weights or predictions are not finite; every rank found so, and starting again would not help."""


class PeerLost(RunError):
    """Another rank, or the way to it, is gone or has failed; the failure itself is told there."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def listed(names: Iterable[str]) -> str:
    """Names in one line, however long or many they are; `none` where there are none."""
    found = list(names)
    shown = [name if len(name) <= 60 else f"{name[:40]}...{name[-10:]}" for name in found[:30]]
    return ", ".join(shown + ([f"and {len(found) - 30} more"] if len(found) > 30 else [])) or "none"


def did_you_mean(name: str, names: Iterable[str], before: str = ", ") -> str:
    """`, did you mean X?` where one of `names` is like `name`, in another case or misspelt; else nothing."""
    by_letters = {known.strip().casefold(): known for known in names}
    near = difflib.get_close_matches(name.strip().casefold(), by_letters, n=1, cutoff=0.5)
    return f"{before}did you mean {by_letters[near[0]]}?" if near else ""
