"""The errors that a user can put right.

`python -m relops` prints them in one line. Every other exception is a bug of relops, and keeps its traceback. The class
says which of the two an error is, at the place that raises it: nothing has to find out later where an error came from.
Each class is also the built-in exception of its kind, which is what callers of `relops.training` catch.
"""

from __future__ import annotations


class RelopsError(Exception):
    """The base of these errors, whose message says what to put right. Only its subclasses are raised."""


class UsageError(RelopsError, ValueError):
    """A setting, an option or the content of a file breaks a rule. The message names it, the rule, and what was got."""


class OutputError(RelopsError, OSError):
    """A file cannot be written."""


class RunNotFoundError(RelopsError, FileNotFoundError):
    """There is no trained detector at a path."""


class MissingPackageError(RelopsError, ImportError):
    """A package that only training needs is not installed, or is broken."""


class LossError(RelopsError, FloatingPointError):
    """A loss is not finite."""


def user_message(error: Exception) -> str | None:
    """Return the message of an error that the user can put right, or None for a bug."""
    message = str(error)
    if isinstance(error, RelopsError):
        # What a worker of a DataLoader raises is raised again with the worker's traceback as the message, and the
        # traceback ends with the class, the message and a newline.
        return message.rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip("\n")
    # The system's errors name the file. Errors of ops and detectors, which begin with their name as in "relops.nms: ",
    # are about the model's options: the command line passes nothing else to them that is not checked before.
    names_file = isinstance(error, OSError) and error.filename is not None
    names_op = isinstance(error, ValueError) and message.startswith("relops.")
    return message if names_file or names_op else None
