"""Join several processes into one JAX program: those of a TPU pod, or those that environment variables introduce.

A process must join before anything asks JAX for devices, because from then on it knows only its own.
"""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mask2dit_jax.errors import UserError, leave_at_once
from mask2dit_jax.io.run_hold import folder_held

# For processes that nothing introduces to each other: on one machine, or on several without TPUs.
VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def initialize(timeout_s: int = 300, *, sigterm_is_asked_for: bool = False) -> None:
    """Join the other processes of this run, if there are any; a second call does nothing.

    Args:
        timeout_s: seconds to wait for the others.
        sigterm_is_asked_for: whether the caller polls for SIGTERM (training/stopping.py), so that it ends nothing by
            itself.

    Raises:
        UserError: the variables contradict each other, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    told = {name: os.environ.get(name, "") for name in VARIABLES}
    if any(told.values()):
        arguments = _parse(told)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    elif _on_pod():
        arguments = {}  # JAX reads addresses and numbers from the metadata of the VM, or from the variables of GKE
    else:
        return
    jax.config.update("jax_enable_preemption_service", sigterm_is_asked_for)
    where = told["COORDINATOR_ADDRESS"] or "what the TPU's metadata says"
    alone = f"not all processes have met through {where} within {timeout_s} s; start all of them"
    try:
        # JAX aborts with a page of C++ when its own time is up, so ours ends before.
        with exit_after(timeout_s, alone):
            jax.distributed.initialize(**arguments, initialization_timeout=timeout_s + 60)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"this process cannot join the others through {where}: {_first_line(error)}") from error
    leave_at_once(is_first=arguments.get("process_id", _number_of_pod()) == 0)


def gather_json(mine: Any) -> list[Any]:
    """Return the JSON values that all processes passed, in the order of the processes; they wait for each other.

    Args:
        mine: what this process contributes, anything that JSON can hold.
    """
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def held_by_all(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder for all processes of this run: the first one holds it, and the others learn whether it does.

    Raises:
        UserError: on every process alike, if another living run holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as hold:
        failure = ""
        if jax.process_index() == 0:
            try:
                hold.enter_context(folder_held(folder))
            except UserError as error:
                failure = str(error)
        if failure := gather_json(failure)[0]:
            raise UserError(failure)
        yield


@contextlib.contextmanager
def exit_after(seconds: int, message: str) -> Iterator[None]:
    """End the process with one line if the block takes longer; no exception would reach it inside the runtime.

    Args:
        seconds: how long the block may take.
        message: what to print after "error: ".
    """

    def leave() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _on_pod() -> bool:
    """Return whether this host is one of several of a TPU pod.

    JAX puts "tpu" into its platforms where it finds chips and libtpu. A host whose list names one host is alone.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    alone = bool(hosts) and "," not in hosts and not os.environ.get("MEGASCALE_COORDINATOR_ADDRESS")
    return "tpu" in (jax.config.jax_platforms or "") and not alone


def _number_of_pod() -> int | None:
    """Return the number of this process from where JAX keeps it.

    `jax.process_index` would start the devices, which may be what fails, and jax.distributed offers no other way.
    """
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return getattr(global_state, "process_id", None)


def _parse(told: dict[str, str]) -> dict[str, str | int]:
    missing = [name for name, value in told.items() if not value]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too: {', '.join(VARIABLES)} go together")
    address, count, number = told.values()
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"COORDINATOR_ADDRESS={address} is not of the form host:port")
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UserError(f"PROCESS_ID={number} must be a number from 0 to NUM_PROCESSES={count} less one")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
