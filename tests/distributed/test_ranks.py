"""run_on_ranks returns the ranks' results and exceptions, and reports a hang as a failure."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from support.ranks import RankError, run_on_ranks

pytestmark = pytest.mark.cpu_only


class Sum(NamedTuple):
    rank: int
    value: Tensor


def add_up(value: Tensor) -> Sum:
    assert torch.get_num_threads() == 1
    value = value + dist.get_rank()
    dist.all_reduce(value)
    return Sum(dist.get_rank(), value)


# Later calls may need fewer processes, or more.
@pytest.mark.parametrize("world_size", [2, 1, 3])
def test_results_are_returned_by_rank(world_size: int) -> None:
    ones = torch.ones(3)
    total = world_size * ones + sum(range(world_size))
    results = run_on_ranks(world_size, add_up, ones)
    for rank, result in enumerate(results):
        assert isinstance(result, Sum)
        assert result.rank == rank
        assert torch.equal(result.value, total)
    assert len(results) == world_size


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("what went wrong")
    dist.all_reduce(torch.ones(1))


def test_an_exception_is_raised_and_other_ranks_stop_waiting() -> None:
    # If rank 0 kept waiting, this would be a TimeoutError.
    with pytest.raises(KeyError, match="what went wrong") as caught:
        run_on_ranks(2, fail_on_rank_1)
    assert "on rank 0 of 2" in str(caught.value.__cause__)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert "fail_on_rank_1" in str(caught.value.__cause__)
    assert [result.rank for result in run_on_ranks(2, add_up, torch.ones(1))] == [0, 1]


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_unpicklably() -> None:
    raise UnpicklableError(1, 2)


def warn() -> None:
    warnings.warn("watch out", stacklevel=1)


def test_exceptions_that_cannot_be_pickled_and_warnings_are_raised() -> None:
    with pytest.raises(RankError, match="UnpicklableError: 1 and 2"):
        run_on_ranks(1, fail_unpicklably)
    with pytest.raises(UserWarning, match="watch out"):
        run_on_ranks(1, warn)


def test_functions_must_be_module_level() -> None:
    with pytest.raises(TypeError, match="expected a module-level function"):
        run_on_ranks(1, lambda: None)


def end_or_wait(rank: int, exit_code: int | None) -> None:
    """The rank ends its process, or returns. The others wait for it."""
    if dist.get_rank() != rank:
        dist.all_reduce(torch.ones(1))
    elif exit_code is not None:
        os._exit(exit_code)


def test_a_process_that_ends_or_never_answers_is_a_failure() -> None:
    with pytest.raises(RankError, match="rank 0's process ended with exit code 3"):
        run_on_ranks(2, end_or_wait, 0, 3)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not answer within 1 s"):
        run_on_ranks(2, end_or_wait, 0, None, timeout=1.0)
    assert [result.rank for result in run_on_ranks(2, add_up, torch.ones(1))] == [0, 1]
