"""The benchmarks as one program: ``python -m bench COMMAND``."""

from __future__ import annotations

import importlib
import sys

# Each is a module with a function ``main`` of its own. Only the one that is asked for is imported.
COMMANDS = {
    "logits": ("bench.logits", "the loss from logits beside its peers"),
    "linear": ("bench.linear", "the loss from hidden states beside its peers"),
    "trl": ("bench.trl", "a step of SimPOTrainer beside TRL's CPOTrainer"),
    "overhead": ("bench.overhead", "a call on almost no data, and metrics on request"),
    "show": ("bench.common.show", "the tables and the plot of a recorded run"),
    "predicted": ("bench.predicted", "what the machine code of the CUDA kernels allows"),
    "first-light": ("bench.first_light", "every CUDA kernel once, on a GPU, against float64"),
    "gpu": ("bench.gpu.__main__", "all tests and measurements on a machine with a GPU"),
}


def usage() -> str:
    """The commands, one a line."""
    lines = (f"  {name:12s} {meaning}" for name, (_, meaning) in COMMANDS.items())
    return "\n".join(["usage: python -m bench COMMAND [OPTIONS]", "", *lines])


def main() -> int:
    """Runs a command with the options that follow it."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    sys.argv = [f"python -m bench {command}", *sys.argv[2:]]
    return importlib.import_module(module).main()


if __name__ == "__main__":
    sys.exit(main())
