"""python -m relops info, train, eval, predict, propose"""

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
    """Print what is built, what is loaded and what this machine has."""
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
            rows[f"cuda:{i}"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    else:
        rows["GPU"] = "none visible to torch"
    for key, value in rows.items():
        print(f"{key:14}{value}")
    print("\nop" + " " * 36 + "kernels")
    for name, devices in _library.op_kernels().items():
        print(f"{name:38}{', '.join(devices)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its status: 1 or 2 after a line that says why, 128 + the number at a signal."""
    from relops.training.cli import eval, predict, propose, train
    from relops.training.errors import LossError, user_message

    parser = argparse.ArgumentParser(prog="python -m relops")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and loaded").set_defaults(run=info)
    for module in (train, eval, predict, propose):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        status: int = arguments.run(arguments)
        print(end="", flush=True)
        return status
    except BrokenPipeError:  # nobody reads on; at its end Python would try once more to write what is left
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
