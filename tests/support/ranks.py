"""Runs a function in several processes at once, as the ranks of a gloo process group.

The processes start at the first call and are kept until the interpreter ends. Every call has its
own process group. The processes are forked from one that has only imported modules, because the
tests' process has threads.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import inspect
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

START_SECONDS = 120.0
# Modules that take seconds to import and start no threads.
PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel"]
# Ranks usually notice the closed connection of a peer that failed. This is for those that do not.
GRACE_SECONDS = 5.0


class RankError(RuntimeError):
    """A rank's process ended, or its exception cannot be pickled. The text has the traceback."""


class _RemoteTracebacks(Exception):
    """The ``__cause__`` of an exception raised on a rank, with the tracebacks of all ranks."""


class _Call(NamedTuple):
    """The message to a rank: a function of a module, its arguments, and the process group."""

    module: str
    file: str
    function: str
    arguments: bytes
    number: int
    rank: int
    world_size: int
    timeout: float


class _Answer(NamedTuple):
    """The answer of a rank: a pickled result, or a pickled exception and its traceback."""

    content: bytes
    error: str = ""
    # The time of the exception, by a clock that all processes share. An exception that it causes on
    # another rank may arrive first.
    raised_at: float = math.inf


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection


_workers: list[_Worker] = []
_calls = itertools.count()


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Runs ``function(*args)`` in ``world_size`` processes at once. Returns the results by rank.

    In each process, the default group is a gloo group of these ranks, torch has one thread, and
    warnings are errors. ``function`` must be a module-level function. The processes import its
    module under the same name. Arguments and results are pickled.

    Args:
        world_size: The number of processes.
        function: The function.
        *args: Its arguments, equal on all ranks.
        timeout: Seconds after which ranks without an answer are killed.

    Raises:
        Exception: The first exception on a rank. Its ``__cause__`` has the tracebacks of all ranks,
            which have failed too, or were killed.
        RankError: A rank's process ended, or its exception cannot be pickled.
        TimeoutError: Ranks did not answer. Their stacks are in the captured stderr.
    """
    __tracebackhide__ = True  # The report has the tracebacks of the ranks.
    if not isinstance(function, FunctionType) or "." in function.__qualname__:
        raise TypeError(f"function: expected a module-level function, got {function!r}")
    arguments = pickle.dumps(args)
    workers = _start(world_size)
    number = next(_calls)
    try:
        for rank, worker in enumerate(workers):
            call = _Call(
                module=function.__module__,
                file=inspect.getfile(function),
                function=function.__name__,
                arguments=arguments,
                number=number,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
            )
            worker.connection.send(call)
        answers = _collect(workers, timeout)
        for worker in workers:  # All ranks have answered, so they can leave the group.
            worker.connection.send(None)
        _collect(workers, timeout)
    except BaseException:
        _kill()
        raise
    errors = {rank: answer for rank, answer in answers.items() if answer.error}
    if not errors:
        return [pickle.loads(answers[rank].content) for rank in range(world_size)]
    reports = _RemoteTracebacks(
        "".join(f"\n\non rank {rank} of {world_size}:\n{e.error}" for rank, e in errors.items())
    )
    first = min(errors.values(), key=lambda answer: answer.raised_at)
    raise pickle.loads(first.content) from reports


@cache
def _store() -> dist.TCPStore:
    """The store through which the ranks of a call find each other, under the call's own prefix.

    The tests' process owns it, so that it outlives every group.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _start(world_size: int) -> list[_Worker]:
    """The first ``world_size`` processes. Starts those that do not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    new: list[_Worker] = []
    for _ in range(world_size - len(_workers)):
        connection, theirs = context.Pipe()
        # A daemon ends with the interpreter.
        process = context.Process(target=_serve, args=(theirs, _store().port), daemon=True)
        with environment:
            process.start()
        theirs.close()
        new.append(_Worker(process, connection))
    _workers.extend(new)
    try:
        _collect(new, START_SECONDS)
    except BaseException:
        _kill()
        raise
    return _workers[:world_size]


def _collect(workers: list[_Worker], timeout: float) -> dict[int, _Answer]:
    """One answer of each worker, by rank, in the order of arrival."""
    answers: dict[int, _Answer] = {}
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                answers[rank] = connection.recv()
            except (EOFError, OSError):
                process = workers[rank].process
                process.join(GRACE_SECONDS)
                message = f"rank {rank}'s process ended with exit code {process.exitcode}"
                answers[rank] = _Answer(pickle.dumps(RankError(message)), f"{message}\n")
            if answers[rank].error:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    errors = [
        f"\n\non rank {rank}:\n{answer.error}" for rank, answer in answers.items() if answer.error
    ]
    if waiting:
        silent = sorted(waiting.values())
        for rank in silent:
            _print_stacks(workers[rank])
        reason = "".join(errors) or f" within {timeout:g} s"
        raise TimeoutError(f"ranks {silent} of {len(workers)} did not answer{reason}")
    if any(worker.process.exitcode is not None for worker in workers):
        raise RankError("".join(errors))
    return answers


def _print_stacks(worker: _Worker) -> None:
    if worker.process.pid is not None and worker.process.is_alive():
        os.kill(worker.process.pid, signal.SIGUSR1)
        time.sleep(0.1)


def _kill() -> None:
    """Kills all processes. The next call starts new ones."""
    for worker in _workers:
        worker.process.kill()
    for worker in _workers:
        worker.process.join()
        worker.process.close()
        worker.connection.close()
    _workers.clear()


def _serve(connection: Connection, port: int) -> None:
    """Runs in a rank's process: answers calls until the tests' process ends."""
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connection.send(_Answer(b""))
    try:
        while True:
            _answer(connection, connection.recv(), store)
    except (EOFError, BrokenPipeError):
        return


def _answer(connection: Connection, call: _Call, store: dist.Store) -> None:
    """Runs one call. Without an error, its group exists until all ranks have answered."""
    result = None
    try:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(call.number), store),
            rank=call.rank,
            world_size=call.world_size,
            timeout=timedelta(seconds=call.timeout + GRACE_SECONDS),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function = getattr(_module(call.module, call.file), call.function)
            result = function(*pickle.loads(call.arguments))
        answer = _Answer(pickle.dumps(result))
    except BaseException as error:
        answer = _failure(error)
    result = None
    if answer.error:
        _leave_group()  # Other ranks may be waiting on its connections.
    connection.send(answer)
    connection.recv()
    _leave_group()
    connection.send(_Answer(b""))


def _module(name: str, file: str) -> ModuleType:
    """The module under its name in the tests' process, which pytest may have invented."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pickle imports the parents of a class's module, which may not be on the path.
    for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
        sys.modules.setdefault(parent, ModuleType(parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    gc.freeze()  # A collection need not visit modules.
    return module


def _failure(error: BaseException) -> _Answer:
    raised_at = time.monotonic()
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)  # Their variables may hold the group.
    try:
        content = pickle.dumps(error)
        if type(pickle.loads(content)) is type(error):
            return _Answer(content, text, raised_at)
    except Exception:
        pass
    return _Answer(pickle.dumps(RankError(text)), text, raised_at)


def _leave_group() -> None:
    if not dist.is_initialized():
        return
    gc.collect()  # Objects such as DDP's reducer may hold the group.
    dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        # These caches take equal meshes for one, though their groups differ.
        debug._clear_python_sharding_prop_cache()
        debug._clear_fast_path_sharding_prop_cache()
