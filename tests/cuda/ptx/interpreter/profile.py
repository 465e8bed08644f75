"""Counts of what was executed of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .module import Array, Kernel


@dataclass
class Profile:
    kernel: Kernel
    executed: Array = field(init=False)  # how many threads have executed each instruction
    steps: int = 0  # instructions, each executed for a group of threads
    reports: set[str] = field(default_factory=set)  # what is wrong and did not stop the kernel

    def __post_init__(self) -> None:
        self.executed = np.zeros(len(self.kernel.instructions), np.int64)
