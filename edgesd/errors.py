"""The errors edgesd raises on purpose: each says what came, what is allowed and what to do.

Only `edgesd.cli` turns them into an exit; a library caller catches `EdgesdError` or one of its kinds.
"""

INTERRUPTED = "interrupted; nothing half-done was left behind"  # what Ctrl-C ends with


class EdgesdError(Exception):
    """Base of every deliberate error. `exit_code` is what the command line exits with.

    came: what was given or found. allowed: what would have been accepted. do: the next thing to try.
    """

    exit_code = 2

    def __init__(self, came: str, allowed: str, do: str) -> None:
        self.came, self.allowed, self.do = came, allowed, do
        super().__init__(f"{came}. Allowed: {allowed}. {do}.")

    def __reduce__(self):  # crosses process borders (converters run in children)
        return type(self), (self.came, self.allowed, self.do)


class RequestError(EdgesdError):
    """The request cannot be met as written: a bad flag, name, number or combination (exit 2)."""

    exit_code = 2


class GateError(EdgesdError):
    """The work was done and a quality gate was not met; nothing was shipped (exit 3)."""

    exit_code = 3


class DataError(EdgesdError):
    """A file or bundle is broken, truncated, hostile or too new (exit 4)."""

    exit_code = 4


class SetupError(EdgesdError):
    """This environment lacks something: a package, memory, disk space, a platform (exit 5)."""

    exit_code = 5
