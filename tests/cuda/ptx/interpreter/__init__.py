"""PTX, as nvcc emits it, executed on the CPU.

`parse` reads an entry, `Program` binds its instructions to functions, and `run` executes a grid.

A kernel that does what a GPU would not report raises `KernelFault`:

- an access out of bounds or misaligned, or a load of memory that nobody has written;
- an access to an address that another thread writes, without a barrier between the two;
- a barrier or a shuffle that some of its threads do not reach;
- an integer division by zero.

An instruction, type or modifier that is not known here raises NotImplementedError. A read of a
register that was not written before is noted in the `Profile` and does not stop the kernel.
"""

from .machine import run
from .memory import READABLE, WRITABLE, WRITTEN, Memory
from .module import Instruction, Kernel, KernelFault, entries, parse
from .profile import Profile
from .program import Program, Rounding

__all__ = [
    "READABLE",
    "WRITABLE",
    "WRITTEN",
    "Instruction",
    "Kernel",
    "KernelFault",
    "Memory",
    "Profile",
    "Program",
    "Rounding",
    "entries",
    "parse",
    "run",
]
