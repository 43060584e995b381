"""The two failures a user can act on; the command line turns them into an exit code."""


class InputError(Exception):
    """What the user gave cannot be used: a file, a row, a config key, a credential (exit code 2).

    The message is one line that names the thing and says what to do.
    """


class RunError(Exception):
    """The work itself failed although the input was good (exit code 1)."""
