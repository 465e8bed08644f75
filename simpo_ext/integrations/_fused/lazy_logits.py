"""Logits that are not there: what lm_head returns while log-probabilities take their place.

A model does what it does with them. A factor and a softcap are noted down, for the kernels to
apply, and a float32 copy need not be made. Anything else forms the logits and goes on with them, so
that no model gets to see, or change, numbers that are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["LazyLogits", "Transform"]

Operation = Callable[[Tensor], Tensor]


class Transform(NamedTuple):
    """What becomes of logits z: ``s = logit_scale * z``, or ``softcap * tanh(s / softcap)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class _Change(NamedTuple):
    """``inner * z``, or, with an outer, ``outer * tanh(inner * z)``."""

    inner: float = 1.0
    outer: float | None = None

    def times(self, factor: float) -> _Change:
        if self.outer is None:
            return _Change(self.inner * factor)
        return _Change(self.inner, self.outer * factor)

    def tanh(self) -> _Change | None:
        return _Change(self.inner, 1.0) if self.outer is None else None

    def transform(self) -> Transform | None:
        """As the kernels have it; None where they have not."""
        scale = self.inner if self.outer is None else self.inner * self.outer
        if math.isclose(scale, 1.0, rel_tol=1e-12):  # of a softcap's division and product
            scale = 1.0
        is_softcap_known = self.outer is None or 1e-30 <= self.outer <= 1e30
        is_known = math.isfinite(scale) and scale >= 1e-30 and is_softcap_known
        return Transform(scale, self.outer) if is_known else None


class _Record:
    """What has been done to logits, of all tensors that share them."""

    def __init__(
        self,
        form: Callable[[], Tensor],
        vocabulary: int,
        dtype: torch.dtype,
        change: _Change,
        replayed: tuple[Operation, ...],
    ) -> None:
        self.form = form
        self.vocabulary = vocabulary
        self.dtype = dtype
        self.change = change
        self.replayed = replayed
        self.logits: Tensor | None = None  # once they have been formed
        self.formed_for = ""

    def formed(self, name: str) -> Tensor:
        """The logits, from now on those that everything is done to."""
        if self.logits is None:
            logits = self.form()
            for operation in self.replayed:
                logits = operation(logits)
            self.logits, self.formed_for = logits, name
        return self.logits


class LazyLogits(Tensor):
    """Stands for logits [B, T, V], and carries a tensor [B, T, 1] through whatever is done to them.

    Made by :meth:`instead_of`.
    """

    _record: _Record

    @classmethod
    def instead_of(
        cls, form: Callable[[], Tensor], vocabulary: int, dtype: torch.dtype, payload: Tensor
    ) -> LazyLogits:
        """Makes them of what they carry.

        Args:
            form: Makes the logits [B, T, V].
            vocabulary: V.
            dtype: Of the logits.
            payload: [B, T, 1], no view, and nobody else's: it is the result, of another class.
        """
        return _as_lazy(payload, _Record(form, vocabulary, dtype, _Change(), ()))

    def transform(self) -> Transform | None:
        """What has been done to the logits; None where the kernels know no such thing."""
        record = self._record
        return None if record.logits is not None else record.change.transform()

    def formed_for(self) -> str:
        """The name of what they had to be formed for; empty where they have not been."""
        return self._record.formed_for

    def formed(self) -> Tensor:
        """The logits themselves, after all that has been done to them."""
        return self._record.formed("the loss")

    def take_payload(self) -> Tensor:
        """What has been carried, as an ordinary tensor, which this one becomes."""
        del self._record
        self.__class__ = Tensor  # type: ignore[assignment]
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Notes down what is done, or does it to the logits."""
        kwargs = kwargs or {}
        if func in _OF_THE_PAYLOAD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, LazyLogits) and first._record.logits is None:
            note = _NOTED.get(func)
            result = NotImplemented if note is None else note(first, func, *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", repr(func))

        def formed(value: Any) -> Any:
            return value._record.formed(name) if isinstance(value, LazyLogits) else value

        return func(*tree_map(formed, tuple(args)), **tree_map(formed, dict(kwargs)))


def _as_lazy(payload: Tensor, record: _Record) -> LazyLogits:
    payload.__class__ = LazyLogits  # by as_subclass it would be a view, which FSDP warns of
    assert isinstance(payload, LazyLogits)
    payload._record = record
    return payload


# ---- what is noted down --------------------------------------------------------------------------
# Each returns what the function is to return, or NotImplemented.


def _changed(lazy: LazyLogits, change: _Change | None, operation: Operation) -> Any:
    if change is None:
        return NotImplemented
    record = lazy._record
    replayed = (*record.replayed, operation)
    with torch._C.DisableTorchFunctionSubclass():
        payload = lazy.clone()
    return _as_lazy(
        payload, _Record(record.form, record.vocabulary, record.dtype, change, replayed)
    )


def _changed_in_place(lazy: LazyLogits, change: _Change | None, operation: Operation) -> Any:
    if change is None:
        return NotImplemented
    record = lazy._record
    record.change, record.replayed = change, (*record.replayed, operation)
    return lazy


def _is_factor(other: object) -> bool:
    return isinstance(other, int | float) and not isinstance(other, bool) and other != 0


def _multiplied(lazy: LazyLogits, func: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_factor(other):
        return NotImplemented
    change = lazy._record.change.times(float(other))
    return _note(func)(lazy, change, lambda logits: func(logits, other))


def _divided(lazy: LazyLogits, func: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_factor(other):
        return NotImplemented
    change = lazy._record.change.times(1.0 / float(other))
    return _note(func)(lazy, change, lambda logits: func(logits, other))


def _tanh(lazy: LazyLogits, func: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _note(func)(lazy, lazy._record.change.tanh(), func)


def _note(func: Any) -> Callable[[LazyLogits, _Change | None, Operation], Any]:
    return _changed_in_place if func.__name__.endswith("_") else _changed


def _in_float32(lazy: LazyLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy in float32, in which the kernels compute anyway."""
    record = lazy._record
    dtype: torch.dtype | None = torch.float32
    is_like_another = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    if func is Tensor.to and "copy" not in kwargs and not is_like_another:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if memory_format is not None or device not in (None, lazy.device):
            return NotImplemented
    elif args or kwargs:
        return NotImplemented
    if dtype is None or dtype == record.dtype:
        return lazy
    if dtype != torch.float32 or record.dtype == torch.float64:
        return NotImplemented
    copy = _changed(lazy, record.change, lambda logits: logits.float())
    copy._record.dtype = dtype
    return copy


def _itself(lazy: LazyLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else lazy


def _alias(lazy: LazyLogits, func: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        payload = func(lazy)
    return _as_lazy(payload, lazy._record)


def _dtype(lazy: LazyLogits, func: Any, *_: Any) -> Any:
    return lazy._record.dtype


def _size(lazy: LazyLogits, func: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        size = torch.Size((*lazy.size()[:-1], lazy._record.vocabulary))
    if func is not Tensor.size or not (args or kwargs):
        return size
    return torch.empty(size, device="meta").size(*args, **kwargs)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_NOTED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.mul, Tensor.mul_, torch.mul), _multiplied),
    **dict.fromkeys((Tensor.multiply, Tensor.multiply_, torch.multiply), _multiplied),
    **dict.fromkeys((Tensor.div, Tensor.div_, torch.div), _divided),
    **dict.fromkeys((Tensor.divide, Tensor.divide_, torch.divide), _divided),
    **dict.fromkeys((Tensor.true_divide, Tensor.true_divide_, torch.true_divide), _divided),
    **dict.fromkeys((Tensor.tanh, Tensor.tanh_, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.float, Tensor.to), _in_float32),
    Tensor.contiguous: _itself,
    Tensor.detach: _alias,  # DeepSpeed's, in the hooks of a module
    _getter("dtype"): _dtype,
    _getter("shape"): _size,
    Tensor.size: _size,
}
# What hooks of DDP, FSDP and DeepSpeed ask of any output, or do to it.
_OF_THE_PAYLOAD = {
    Tensor.register_hook,
    Tensor.is_floating_point,
    torch.is_floating_point,
    Tensor._is_view,
    *(
        _getter(name)
        for name in (
            *("requires_grad", "grad_fn", "is_leaf", "_base", "_version"),
            *("device", "layout", "is_cuda", "is_meta", "is_nested", "is_sparse"),
        )
    ),
}
