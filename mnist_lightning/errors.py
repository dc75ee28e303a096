"""The one exception for what a person can mend: expected, got, remedy."""

import sys
from collections.abc import Iterable

Reason = tuple[str, str, str]  # the three lines: expected, got, remedy


class UserError(ValueError):
    """Raised for wrong input. The command line prints it in three lines and exits with code 2.

    Args:
        expected: what would have been right.
        got: what was found, with the offending value or path.
        remedy: what to do next.
    """

    def __init__(self, expected: str, got: str, remedy: str) -> None:
        super().__init__(f"expected {expected}\ngot {got}\n{remedy}")


def refuse(reasons: Iterable[Reason]) -> None:
    """Raises UserError with the first of the reasons, if there is one."""
    for reason in reasons:
        raise UserError(*reason)


def report(error: UserError) -> int:
    """Prints the three lines to stderr; returns the exit code, 2."""
    print("error: " + str(error).replace("\n", "\n       "), file=sys.stderr)
    return 2
