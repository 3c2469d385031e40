"""The errors that a user can fix.

`python -m relops` prints each of these errors as one line. Any other exception is a bug in relops, and its traceback is
printed. The code that raises an error chooses its class, so no other code has to guess whether the user can fix the
error. Each class also derives from the matching built-in exception, so callers of `relops.training` can catch the
built-in exception.
"""

from __future__ import annotations


class RelopsError(Exception):
    """The base class of the errors that a user can fix. Only its subclasses are raised."""


class UsageError(RelopsError, ValueError):
    """An error in a setting, an option or an input file.

    The message names the faulty item, its value, and the rule that the value breaks.
    """


class OutputError(RelopsError, OSError):
    """An error while writing a file."""


class RunNotFoundError(RelopsError, FileNotFoundError):
    """An error for a path at which there is no trained detector."""


class MissingPackageError(RelopsError, ImportError):
    """An error for a missing or broken package that only training needs."""


class LossError(RelopsError, FloatingPointError):
    """An error for a loss that is not finite."""


def user_message(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, or None for a bug."""
    message = str(error)
    if isinstance(error, RelopsError):
        # A DataLoader raises the exception of a worker again, with the worker's traceback as the message. This
        # traceback ends with the exception class, the original message and a newline.
        return message.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip("\n")
    # The user can fix errors of the operating system that name a file. The user can also fix errors that an op or a
    # detector raises, whose messages begin with a prefix such as "relops.nms: ". Only the options of the model can
    # cause such errors, because all other arguments that the commands pass to ops were checked before.
    names_file = isinstance(error, OSError) and error.filename is not None
    names_op = isinstance(error, ValueError) and message.startswith("relops.")
    return message if names_file or names_op else None
