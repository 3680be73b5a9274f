"""Executors: where the items of a sweep are run. In this process by default; on several devices by threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from aqnfx.errors import InputError
from aqnfx.probes.work import Item, Outcome, Worker

Unit = Sequence[Item]
"""Items of one probe on one batch, which share a clean run: the piece that one worker takes at a time."""


class Executor(Protocol):
    """Runs units and yields the outcome of every item as it comes; the order does not matter."""

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Yield the outcomes; closing the iterator ends the work."""


def accelerators() -> tuple[str, ...]:
    """Return the accelerators of this machine, by the names that PyTorch gives them."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return () if kind is None else tuple(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))


class InProcess:
    """Runs everything in this process, in order."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Run the units one by one."""
        for unit in units:
            yield from self._worker.run(unit)


class Threads:
    """Runs units on several workers, one thread each: one copy of the model per device.

    Units of a batch go to whoever is free, and a worker stays with a batch as long as it has units. The first error of a
    worker ends the run and is raised here.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        if not workers:
            raise InputError("there is no device to run on")
        self._workers = tuple(workers)

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Run the units side by side."""
        # Taken one by one, when somebody is free: what is wanted may depend on what came before.
        waiting, turn = iter(units), threading.Lock()
        found: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work(worker: Worker) -> None:
            try:
                while not stop.is_set():
                    with turn:
                        unit = next(waiting, None)
                    if unit is None:
                        return
                    for outcome in worker.run(unit):
                        found.put(outcome)
                        if stop.is_set():
                            return
            except BaseException as error:  # raised in the thread that waits for it
                found.put(error)
            finally:
                found.put(None)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                outcome = found.get()
                if outcome is None:
                    running -= 1
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    yield outcome
        finally:
            stop.set()
            for thread in threads:
                thread.join()
