"""The command line of relops: `python -m relops` with the commands info, models, train, eval, predict and propose."""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import signal
import sys

import torch


def info(_: argparse.Namespace) -> int:
    """Print how relops was built, which kernels are loaded, and which devices this machine has."""
    import relops
    from relops import _library

    build = _library.build_info()
    rows = {
        "relops": relops.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (built with {build['torch']})",
        "C++ compiler": build["compiler"],
        "CPU kernels": f"{build['cpu_isa']}, {torch.get_num_threads()} threads",
        "CUDA kernels": _library.cuda_missing or "loaded",
    }
    if build["cuda_archs"]:
        rows["CUDA archs"] = f"{build['cuda_archs']} (nvcc {build['nvcc']})"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            unusable = _library.cuda_missing is None and _library.cuda_problem(torch.device("cuda", i)) is not None
            note = " (relops._cuda was not built for it)" if unusable else ""
            rows[f"cuda:{i}"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}{note}"
    else:
        rows["GPU"] = "none visible to torch"
    for key, value in rows.items():
        print(f"{key:14}{value}")
    print("\nop" + " " * 36 + "kernels")
    for name, devices in _library.op_kernels().items():
        print(f"{name:38}{', '.join(devices)}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser for all commands."""
    from relops.training.cli import eval, models, predict, propose, train
    from relops.training.cli.arguments import CommandParser, add_command

    parser = argparse.ArgumentParser(prog="python -m relops", description="Train and run the detectors of relops.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    add_command(commands, "info", "show how relops was built and which kernels are loaded").set_defaults(run=info)
    for module in (models, train, eval, predict, propose):
        module.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0 after success, 1 if a loss is not finite or if `predict` skipped an image, 2 after any other error
    that the user can fix, and 128 plus the signal number if a signal stopped the command. An error that the user can
    fix is printed as one line without a traceback.
    """
    from relops.training.errors import LossError, user_message

    arguments = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain bytes that cannot be encoded
    try:
        status: int = arguments.run(arguments)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # the reader closed the pipe, so the flush of stdout at exit would also fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        message = re.sub(r"\s*\n\s*", " ", message)
        print(f"relops {arguments.command}: {message}", file=sys.stderr)
        return 1 if isinstance(error, LossError) else 2


if __name__ == "__main__":
    sys.exit(main())
