"""Many processes of one run: how they meet, agree and stop.

All processes run the same program and call the same collectives in the same order. What one of them
alone should do (prepare data, write markers and results), the first does, and the others wait.
Everything here is a plain local matter where there is one process.
"""

import json
import re
import secrets
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from gsm_verifier import storage

COME_WITHIN = 300  # seconds, in which all processes must have started
SHARDS_KEPT = "stopped; whole shards are kept; run again to go on"  # while sampling and valuing
DEAD_AFTER = 10  # seconds without a sign of a process's life, after which all others end


def meet(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes; before anything asks for a device.

    Args:
      coordinator: host:port of process 0. count: how many there are. index: which this one is. All
        None on Cloud TPU, GKE and Slurm, which tell.

    Raises:
      ValueError: some are given and some are not; or none, where nothing tells.
    """
    told = (coordinator, count, index)
    if told.count(None) in (1, 2):
        raise ValueError("--coordinator, --processes and --process go together")
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator={coordinator}: give host:port of process 0")
    at = f"process 0 at {coordinator}" if index else "the other processes"
    print(f"waiting up to {COME_WITHIN} s for {at}", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is `Termination`'s
    try:
        jax.distributed.initialize(
            *told,
            initialization_timeout=COME_WITHIN,
            heartbeat_timeout_seconds=DEAD_AFTER,
            shutdown_timeout_seconds=DEAD_AFTER,
        )
    except ValueError as error:
        raise ValueError(f"{error} Give --coordinator, --processes, --process") from error


def first() -> bool:
    """Is this the process that writes what there is one of?"""
    return jax.process_index() == 0


def wait_for_all(moment: str) -> None:
    """Go on when every process has come to this moment, which all name alike."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def largest(*numbers: int) -> list[int]:
    """The largest of every process's first numbers, of their second ones, and so on."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.asarray(numbers, np.int32)).max(0).tolist()


def agree(told: Callable[[], Mapping[str, Any]], folder: Path) -> None:
    """Refuse processes that were told different things, or for which a folder isn't the same.

    They would compute something else together, and say nothing, or wait for each other forever.
    Before anything else they do together. What one of two wasn't told isn't compared.

    Raises:
      ValueError: on all of them, naming what differs and where.
    """
    if not jax.distributed.is_initialized():  # and don't ask for a device, which takes seconds
        return
    if len(set(Counter(device.process_index for device in jax.devices()).values())) > 1:
        raise ValueError("processes with different numbers of devices: give all the same")
    mine = json.dumps(told(), sort_keys=True, default=str).encode()
    (size,) = largest(len(mine))
    padded = np.frombuffer(mine.ljust(size), np.uint8)
    everyones = [json.loads(x.tobytes()) for x in multihost_utils.process_allgather(padded)]
    for index, others in enumerate(everyones):
        for key in sorted({*everyones[0]} & {*others}):
            ours, theirs = (x[key] for x in (everyones[0], others))
            if ours != theirs:
                raise ValueError(
                    f"process {index} was started with {key}={theirs}, process 0 with {ours}: "
                    "start all of them with the same"
                )
    (number,) = largest(secrets.randbits(31) if first() else 0)
    sign = folder / f".together-{number}"
    if first():
        storage.write_atomically(sign, b"")
    wait_for_all("a sign is in the folder")
    seen = multihost_utils.process_allgather(np.asarray(sign.exists()))
    if first():
        sign.unlink()
    if not seen.all():
        raise ValueError(
            f"process {int(np.argmin(seen))} doesn't see what process 0 writes in {folder}: "
            "--workdir must be one folder of all, on a shared file system or in a bucket"
        )


def gather(mine: np.ndarray) -> list[np.ndarray]:
    """Every process's int32 numbers, as many as each has."""
    if jax.process_count() == 1:
        return [mine]
    (most,) = largest(len(mine))
    padded = np.zeros(1 + most, np.int32)
    padded[0], padded[1 : 1 + len(mine)] = len(mine), mine
    return [row[1 : 1 + row[0]] for row in multihost_utils.process_allgather(padded)]


def bar(what: str, unit: str, total: int, done: int = 0) -> tqdm:
    """The progress of the first process's part, of which so much was done before.

    Until its user gives it another postfix, with the first that is done, it says that a program is
    compiled: that can take minutes.
    """
    made = tqdm(desc=what, unit=unit, total=total, initial=done, mininterval=1, disable=not first())
    if done < total:
        made.set_postfix_str("compiling")
    return made


class Stopped(Exception):
    """The run was asked to end, and has saved what it goes on from."""


class Termination:
    """Within it, SIGTERM, or a Ctrl-C, doesn't end the process but is noted, for all to see.

    One that came after the last look ends the process as it leaves.

    with Termination() as termination:
        ...
        if termination.asked():  # the same on all processes, which ask equally often

    Attributes:
      noted: has this process been asked to end?
    """

    def __init__(self) -> None:
        self.noted, self._came = False, 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C doesn't wait for the end of the step
        self.noted, self._came = True, number

    def asked(self) -> bool:
        """Has any process been asked to end?"""
        return bool(largest(self.noted)[0])

    def __enter__(self) -> "Termination":
        self._before = [(n, signal.signal(n, self._note)) for n in (signal.SIGTERM, signal.SIGINT)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
        if self._came and kind is None:
            signal.raise_signal(self._came)
