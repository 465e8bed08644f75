"""How often each instruction of a kernel was executed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .module import Array, Kernel


@dataclass
class Profile:
    kernel: Kernel
    executed: Array = field(init=False)  # how many threads have executed each instruction
    reports: set[str] = field(default_factory=set)  # faults that did not stop the kernel

    def __post_init__(self) -> None:
        self.executed = np.zeros(len(self.kernel.instructions), np.int64)
