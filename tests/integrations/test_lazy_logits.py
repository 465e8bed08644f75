"""LazyLogits record scalings and softcaps, and compute the logits for any other operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from simpo_ext.integrations._fused.lazy_logits import LazyLogits, Transform

Operation = Callable[[Tensor], Tensor]
B, T, V = 2, 3, 7


def in_place(change: Callable[[Tensor], object]) -> Operation:
    def operation(logits: Tensor) -> Tensor:
        change(logits)
        return logits

    return operation


def set_one(logits: Tensor) -> None:
    logits[..., 2] = -9.0


FACTORS = (0.5, 3, -2.0, 1e-3)
NOTED: dict[str, Operation] = {
    **{f"times {c}": lambda z, c=c: z * c for c in FACTORS},
    **{f"{c} times": lambda z, c=c: c * z for c in FACTORS},
    **{f"over {c}": lambda z, c=c: z / c for c in FACTORS},
    "torch.mul": lambda z: torch.mul(z, 0.25),
    "torch.div": lambda z: torch.div(z, 4),
    "torch.tanh": torch.tanh,
    "tanh": lambda z: z.tanh(),
    "functional.tanh": torch.nn.functional.tanh,
    "softcap": lambda z: 5.0 * torch.tanh(z / 5.0),
    "softcap in place": in_place(lambda z: z.div_(5.0).tanh_().mul_(5.0)),
    "times in place": in_place(lambda z: z.mul_(2.0)),
    "contiguous": lambda z: z.contiguous(),
    "to itself": lambda z: z.to(z.dtype).to(z.device),
}
FORMING: dict[str, Operation] = {
    "plus": lambda z: z + 1.0,
    "minus": lambda z: -z,
    "times a tensor": lambda z: z * torch.full((), 2.0),
    "times True": lambda z: z * True,
    "times 0": lambda z: z * 0,
    "divided and rounded": lambda z: torch.div(z, 2.0, rounding_mode="floor"),
    "1 over": lambda z: 1.0 / z,
    "softmax": lambda z: z.log_softmax(-1),
    "relu": torch.relu,
    "roll": lambda z: z.roll(1, -1),
    "set": in_place(set_one),
    "masked": in_place(lambda z: z.masked_fill_(z > 0.5, 0.5)),
    "through a view": in_place(lambda z: z[..., 1:].mul_(2.0)),
    "through data": in_place(lambda z: z.data.add_(1.0)),
    "copied": lambda z: z.clone(),
    "to bfloat16 and back": lambda z: z.to(torch.bfloat16).to(z.dtype),
    "over chunks": lambda z: torch.cat([part * 2.0 for part in z.chunk(2, -1)], -1),
    "to another's dtype": lambda z: z.to(z[..., :1]),
    "by its shape": lambda z: z.view(-1, z.shape[-1]).view(z.shape),
}


def some_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, V, dtype=dtype, generator=torch.Generator().manual_seed(0))


def lazy_of(logits: Tensor) -> LazyLogits:
    payload = torch.arange(B * T, dtype=torch.float32).view(B, T, 1).clone()
    return LazyLogits.instead_of(logits.clone, V, logits.dtype, payload)


def transformed(logits: Tensor, transform: Transform) -> Tensor:
    scaled = transform.logit_scale * logits
    cap = transform.softcap
    return scaled if cap is None else cap * torch.tanh(scaled / cap)


def as_logits(result: Tensor) -> Tensor:
    return result.formed() if isinstance(result, LazyLogits) else result


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(NOTED)), max_size=5))
def test_recorded_operations_give_the_same_logits(names: list[str]) -> None:
    tanhs = [name for name in names if "tanh" in name or "softcap" in name]
    assume(len(tanhs) <= 1)  # A second tanh computes the logits.
    logits = some_logits()
    expected, found = logits.clone(), lazy_of(logits)
    for name in names:
        expected, found = NOTED[name](expected), NOTED[name](found)
        assert isinstance(found, LazyLogits)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    transform = found.transform()
    if transform is None:  # The kernels take positive factors only.
        assert any("-" in name for name in names)
    else:
        torch.testing.assert_close(transformed(logits, transform), expected)
    assert found.formed_for() == ""
    assert torch.equal(found.formed(), expected)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(sorted(NOTED)), max_size=2),
    st.sampled_from(sorted(FORMING)),
    st.lists(st.sampled_from(sorted({**NOTED, **FORMING})), max_size=2),
)
def test_any_other_operation_computes_the_logits(
    before: list[str], name: str, after: list[str]
) -> None:
    logits = some_logits()
    expected, found = logits.clone(), lazy_of(logits)
    for operation in (*before, name, *after):
        expected = {**NOTED, **FORMING}[operation](expected)
        found = {**NOTED, **FORMING}[operation](found)
    assert not isinstance(found, LazyLogits) or found.transform() is None
    torch.testing.assert_close(as_logits(found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMING)
def test_formed_for_names_the_operation(name: str) -> None:
    lazy = lazy_of(some_logits())
    FORMING[name](lazy)
    assert lazy.transform() is None
    assert lazy.formed_for()


def test_a_softcap_is_recognized_exactly() -> None:
    for softcap in (5.0, 15.0, 30.0, 50.0):
        lazy = lazy_of(some_logits())
        found = torch.tanh(lazy / softcap) * softcap
        assert found.transform() == Transform(1.0, softcap)
        assert lazy.transform() == Transform()
    lazy = lazy_of(some_logits()) / 8.0
    assert lazy.transform() == Transform(0.125)


def test_a_float32_copy_of_short_logits_is_not_made() -> None:
    logits = some_logits(torch.bfloat16)
    for copy in (lambda z: z.float(), lambda z: z.to(torch.float32)):
        lazy = lazy_of(logits)
        found = copy(lazy)
        assert isinstance(found, LazyLogits)
        assert (lazy.dtype, found.dtype) == (torch.bfloat16, torch.float32)
        assert found.transform() == Transform()
        assert torch.equal(found.formed(), logits.float())
    assert not isinstance(lazy_of(some_logits()).float(), LazyLogits)  # It would be less precise.


def test_the_payload_is_a_plain_tensor_with_a_gradient() -> None:
    source = torch.randn(B, T, 1, requires_grad=True)
    lazy = LazyLogits.instead_of(lambda: some_logits(), V, torch.float64, source.clone())
    assert lazy.requires_grad and lazy.grad_fn is not None and not lazy._is_view()
    seen: list[Tensor] = []
    lazy.register_hook(seen.append)
    payload = lazy.take_payload()
    assert type(payload) is Tensor
    assert torch.equal(payload, source)
    payload.sum().backward()
    assert torch.equal(source.grad, torch.ones_like(source))
    assert len(seen) == 1


def test_an_alias_shares_operations() -> None:
    logits = some_logits()
    lazy = lazy_of(logits)
    alias = lazy.detach()
    assert isinstance(alias, LazyLogits)
    alias.mul_(2.0)
    assert lazy.transform() == Transform(2.0)
    set_one(lazy)
    expected = logits * 2.0
    set_one(expected)
    assert torch.equal(alias.formed(), expected)


def test_computed_logits_have_a_gradient() -> None:
    source = some_logits().requires_grad_()
    lazy = LazyLogits.instead_of(lambda: source * 1.0, V, source.dtype, torch.zeros(B, T, 1))
    (lazy * 3.0 + 1.0).sum().backward()
    assert torch.equal(source.grad, torch.full_like(source, 3.0))
