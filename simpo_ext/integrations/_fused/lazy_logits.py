"""A tensor that lm_head returns in place of logits. It carries their log-probabilities.

It records a factor and a softcap instead of applying them, and the kernels apply them. It ignores a
conversion to float32. Any other operation computes the real logits and runs on those, so a model
never reads or changes the log-probabilities by mistake.
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
    """Maps logits z to ``s = logit_scale * z``, or to ``softcap * tanh(s / softcap)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


class _Change(NamedTuple):
    """Maps logits z to ``inner * z``, or to ``outer * tanh(inner * z)`` if outer is not None."""

    inner: float = 1.0
    outer: float | None = None

    def times(self, factor: float) -> _Change:
        if self.outer is None:
            return _Change(self.inner * factor)
        return _Change(self.inner, self.outer * factor)

    def tanh(self) -> _Change | None:
        return _Change(self.inner, 1.0) if self.outer is None else None

    def transform(self) -> Transform | None:
        """The same in the parameters of the kernels; None if the kernels do not support it."""
        scale = self.inner if self.outer is None else self.inner * self.outer
        if math.isclose(scale, 1.0, rel_tol=1e-12):  # (1 / softcap) * softcap rounds
            scale = 1.0
        is_softcap_known = self.outer is None or 1e-30 <= self.outer <= 1e30
        is_known = math.isfinite(scale) and scale >= 1e-30 and is_softcap_known
        return Transform(scale, self.outer) if is_known else None


class _Record:
    """The operations on logits, shared by all tensors that stand for the same logits."""

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
        self.logits: Tensor | None = None  # None: not computed
        self.formed_for = ""

    def formed(self, name: str) -> Tensor:
        """Computes the logits. All later operations run on them."""
        if self.logits is None:
            logits = self.form()
            for operation in self.replayed:
                logits = operation(logits)
            self.logits, self.formed_for = logits, name
        return self.logits


class LazyLogits(Tensor):
    """Stands in for logits [B, T, V] and carries a payload [B, T, 1].

    :meth:`instead_of` makes one.
    """

    _record: _Record

    @classmethod
    def instead_of(
        cls, form: Callable[[], Tensor], vocabulary: int, dtype: torch.dtype, payload: Tensor
    ) -> LazyLogits:
        """Turns a payload into LazyLogits.

        Args:
            form: Computes the logits [B, T, V].
            vocabulary: V.
            dtype: The dtype of the logits.
            payload: [B, T, 1], not a view and not used elsewhere. It is also the result: its class
                changes in place.
        """
        return _as_lazy(payload, _Record(form, vocabulary, dtype, _Change(), ()))

    def transform(self) -> Transform | None:
        """The recorded operations on the logits; None if the kernels do not support them."""
        record = self._record
        return None if record.logits is not None else record.change.transform()

    def formed_for(self) -> str:
        """The name of the operation that computed the logits; empty if none did."""
        return self._record.formed_for

    def formed(self) -> Tensor:
        """The real logits, with the recorded operations applied."""
        return self._record.formed("scale or softcap")

    def take_payload(self) -> Tensor:
        """Turns this object back into the payload, an ordinary tensor."""
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
        """Records a supported operation, or runs any other one on the real logits."""
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
    payload.__class__ = LazyLogits  # as_subclass makes a view, and FSDP warns about views
    assert isinstance(payload, LazyLogits)
    payload._record = record
    return payload


# ---- recorded operations -------------------------------------------------------------------------
# Each handler returns the operation's result, or NotImplemented to run it on the real logits.


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
    """A float32 copy changes nothing for the kernels, which compute in float32 anyway."""
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
    Tensor.detach: _alias,  # DeepSpeed's module hooks call it
    _getter("dtype"): _dtype,
    _getter("shape"): _size,
    Tensor.size: _size,
}
# The hooks of DDP, FSDP and DeepSpeed use these on every output, so they must act on the payload.
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
