"""How much of the kernels' PTX was executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .kernels import Kernels


@dataclass
class Coverage:
    num_executed: int = 0
    num_instructions: int = 0
    lines: list[str] = field(default_factory=list)  # one for each kernel and each gap

    @property
    def share(self) -> float:
        return self.num_executed / self.num_instructions

    def report(self) -> str:
        whole = f"{100 * self.share:.2f}% of {self.num_instructions} instructions were executed"
        return "\n".join((whole, *self.lines))


def coverage(kernels: Kernels, names: Iterable[str]) -> Coverage:
    """The coverage of the kernels with these mangled names."""
    found = Coverage()
    for name in names:
        profile = kernels.profiles.get(name)
        if profile is None:
            found.lines.append(f"never launched  {kernels.names[name]}")
            continue
        instructions = profile.kernel.instructions
        missing = [i for i, count in enumerate(profile.executed) if not count]
        num_executed = len(instructions) - len(missing)
        found.num_executed += num_executed
        found.num_instructions += len(instructions)
        share = 100 * num_executed / len(instructions)
        found.lines.append(f"{share:6.1f}% of {len(instructions):5d}  {kernels.names[name]}")
        for first, last in _ranges(missing):
            found.lines.append(f"    {last - first + 1} never executed, from {instructions[first]}")
    return found


def _ranges(indices: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of successive numbers."""
    starts = [i for k, i in enumerate(indices) if k == 0 or indices[k - 1] != i - 1]
    ends = [i for k, i in enumerate(indices) if k + 1 == len(indices) or indices[k + 1] != i + 1]
    return zip(starts, ends, strict=True)
