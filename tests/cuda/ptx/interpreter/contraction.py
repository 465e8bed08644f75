"""Products that ptxas may fuse with the sums they go into.

PTX lets a compiler contract `mul` and `add` (or `sub`) that have no rounding modifier into a
multiply-add that rounds once. It must leave `mul.rn` and `add.rn` alone. ptxas fuses wherever it
can, which changes results. This module fuses every sum with a product of its own basic block, even
if the product has other uses.
"""

from __future__ import annotations

from .module import Instruction, Operand, Vector

_CONTRACTIBLE = (("f32",), ("f64",))  # modifiers: no .rn


class Products:
    """The products of a basic block whose factors have not been overwritten."""

    def __init__(self) -> None:
        self._products: dict[Operand, Instruction] = {}

    def clear(self) -> None:
        self._products.clear()

    def note(self, instruction: Instruction) -> None:
        """Takes note of the next instruction of the block."""
        if not instruction.operands or instruction.opcode == "st":
            return
        result = instruction.operands[0]
        changed = result.elements if isinstance(result, Vector) else (result,)
        for name, product in list(self._products.items()):
            if any(each == name or each in product.operands[1:] for each in changed):
                del self._products[name]
        is_product = instruction.opcode == "mul" and instruction.modifiers in _CONTRACTIBLE
        if is_product and not instruction.guard and result not in instruction.operands[1:]:
            self._products[result] = instruction

    def in_sum(self, instruction: Instruction) -> tuple[int, Instruction] | None:
        """The place of a sum's term that is a product to fuse with, and that product."""
        if instruction.opcode not in ("add", "sub") or instruction.modifiers not in _CONTRACTIBLE:
            return None
        for i, term in enumerate(instruction.operands[1:]):
            if product := self._products.get(term):
                return i, product
        return None
