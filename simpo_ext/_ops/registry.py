"""How ops are registered with PyTorch and called: fake kernels, autograd, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .library import _C  # importing it registers the ops

ops = torch.ops.simpo_ext

Ctx: TypeAlias = Any  # torch's autograd context, which torch leaves untyped
Function = TypeVar("Function", bound=Callable[..., Any])


def register_fake(name: str) -> Callable[[Function], Function]:
    """torch.library.register_fake, which is untyped."""
    register: Callable[[Function], Function] = torch.library.register_fake(f"simpo_ext::{name}")
    return register


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """torch.library.register_autograd for an op of this package."""
    torch.library.register_autograd(f"simpo_ext::{name}", backward, setup_context=setup_context)


# Some versions of torch pass on the text of an op's error but not its class. So the ops put a tag
# in front of the text: see csrc/include/simpo_ext/error_tags.h.
_ERRORS: dict[str, type[Exception]] = {
    _C.INDEX_ERROR_TAG: IndexError,
    _C.VALUE_ERROR_TAG: ValueError,
}


def call(op: Any, *args: Any) -> Any:
    """Calls a forward op, and turns an error with a tag into one of the class that the tag names.

    Compiled code calls the op directly, so its errors keep the tag in the text.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except (RuntimeError, IndexError, ValueError) as error:
        for tag, kind in _ERRORS.items():
            _, has_tag, message = str(error).partition(tag)
            if has_tag:
                raise kind(message) from None
        raise


def no_double_backward(*_: object) -> None:
    """The backward of a backward op."""
    raise RuntimeError(
        "simpo_ext does not implement double backward: its gradients cannot be differentiated"
    )


def refuse_create_graph() -> None:
    """Raises if autograd records a backward, which would treat the saved tensors as constants."""
    if torch.is_grad_enabled():
        no_double_backward()


def check_no_tangent(*tensors: Tensor | None) -> None:
    """Raises if a tensor has a tangent of forward-mode AD, which the ops would treat as zero."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError("simpo_ext does not implement forward-mode differentiation")


def check_same_device(first: Tensor, *others: Tensor | None) -> None:
    """For fake kernels: torch also calls them with a mix of CPU and meta tensors."""
    for other in others:
        if other is not None:
            torch._check(  # type: ignore[no-untyped-call]
                other.device == first.device,
                lambda: f"expected all tensors on {first.device}, got one on another device",
            )
