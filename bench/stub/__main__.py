"""`python -m bench.stub FILE ...` or `python -m bench.stub -m MODULE ...`: run a program over the stub driver."""

from __future__ import annotations

import os
import runpy
import sys


def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables that choose a backend, and without a GPU."""
    chosen = ("TRITON_INTERPRET", "FUSED_STEER_BACKEND")
    return {name: value for name, value in os.environ.items() if name not in chosen} | {"CUDA_VISIBLE_DEVICES": ""}


def main(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not arguments or arguments == ["-m"]:
        print("bench.stub: nothing to run; expected FILE or -m MODULE, and its arguments", file=sys.stderr)
        raise SystemExit(2)
    environment = clean_environment()
    if environment != dict(os.environ):
        # Triton reads the environment when kernels are imported, and that may already have happened.
        os.execve(sys.executable, [sys.executable, "-m", "bench.stub", *arguments], environment)
    from .driver import arm

    try:
        arm()
    except RuntimeError as error:
        print(f"bench.stub: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
