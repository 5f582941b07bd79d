"""`config["num_processes"]`: a run in processes of this machine that are started here, without a launcher."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ..solve.set_up import ProcessError


def require_forks(
    num_processes: int,
    gpu: int,
) -> None:
    """Raise `ValueError` where processes cannot be started here; a launcher can.

    They are copies of this one, so that a model or a data set of a notebook needs not be pickled.
    """
    why = ""
    if gpu >= 0:
        why = "is for the CPU: a process that has used CUDA cannot be copied"
    elif "fork" not in multiprocessing.get_all_start_methods():
        why = "needs an operating system that copies processes (fork)"
    elif not dist.is_available():
        why = "needs a PyTorch that is built with torch.distributed"
    if why:
        raise ValueError(
            f"config['num_processes'] = {num_processes} {why}; start the script with torchrun --nproc_per_node="
            f"{num_processes} and leave the option out"
        )


def in_processes(
    count: int,
    work: Callable[[], Any],
) -> Any:
    """What `work` returns in the first of `count` copies of this process, each with one thread.

    Raises:
        The exception of the first one that fails; the others are ended then.
    """
    context = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
    ):
        ends = {}
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_one,
                args=(work, rank, count, os.path.join(folder, "store"), theirs),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()  # Python warns that other threads are there; the copy uses one
            stack.callback(_end, process)
            theirs.close()
            ends[ours] = process
        return _first_result(ends)


def _end(
    process: Any,
) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _first_result(
    ends: dict[Any, Any],
) -> Any:
    """The result of rank 0 when all are done; the first failure ends the waiting."""
    result = None
    for end, said in _heard(ends):
        if said is None:
            ends[end].join(timeout=5)
            code = ends[end].exitcode
            raise ProcessError(
                f"a process of the run ended (exit code {code}) without a word: killed, or out of memory?"
            )
        kind, value = said
        if kind == "failed":
            raise value
        result = value if value is not None else result
    return result


def _heard(
    ends: dict[Any, Any],
) -> Iterator[tuple[Any, Any]]:
    """What the processes say, as it comes; None of one that ended without a word."""
    left = list(ends)
    while left:
        ready: list[Any] = wait(left)
        for end in ready:
            left.remove(end)
            yield end, _said(end)


def _said(
    end: Any,
) -> Any:
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        return None


def _one(
    work: Callable[[], Any], rank: int, count: int, store: str, end: Connection
) -> None:
    """In the copy: join the others, work, and say what came of it."""
    torch.set_num_threads(1)  # the pools of threads are not copied
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count
        )
        result = work()
        _say(end, ("done", result if rank == 0 else None))
    except BaseException as error:
        _say(end, ("failed", error))
    threading.Event().wait()  # others may still read what it sent: it is ended from outside


def _end_with_parent() -> None:
    """A process that was killed leaves none behind that goes on with its run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _say(
    end: Connection,
    said: tuple[str, Any],
) -> None:
    try:
        content = pickle.dumps(said)
        pickle.loads(content)
    except Exception:
        kind, error = said
        text = f"{type(error).__name__}: {error}"
        content = pickle.dumps((kind, RuntimeError(text)))
    end.send_bytes(content)
