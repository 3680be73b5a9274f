"""The Ray executor: units of a sweep on the workers of a Ray cluster (``pip install aqnfx[ray]``)."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from aqnfx.errors import AqnfxError, InputError, ProbeError
from aqnfx.graph.frontend import model_digest
from aqnfx.graph.program import Program
from aqnfx.probes.executors import Unit
from aqnfx.probes.work import Outcome, Worker

LOST = 3
"""How many times as many workers as there are may be lost before the run gives up."""
_LOCAL = "ray"


def identity_of(program: Program) -> str:
    """Return what must be equal for two programs to give the same scores: graph, passes and weights."""
    return f"{program.original} {program.pipeline} {model_digest(program)}"


class _Actor:
    """Holds one worker: its model is made once, by ``build``."""

    def __init__(self, build: Callable[[], Worker], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._worker = build()

    def identity(self) -> str:
        """Return what this worker runs, see :func:`identity_of`."""
        return identity_of(self._worker.program)

    def run(self, unit: Unit) -> list[Outcome]:
        """Run one unit."""
        return list(self._worker.run(unit))


class RayExecutor:
    """Runs units on ``workers`` Ray actors, each with a worker made by ``build``, which must be picklable.

    ``address`` is "ray" (the cluster that RAY_ADDRESS names, else one of this machine, started here and ended with this
    executor) or "ray://HOST:PORT" (a cluster's client port), or what else Ray takes. A unit
    whose worker dies is run by another one, and the worker is replaced. ``identity`` is :func:`identity_of` every worker's
    program. Raises :class:`InputError` without Ray or without the cluster, :class:`ProbeError` when a worker has another
    graph or other weights, or too many die.
    """

    def __init__(
        self, build: Callable[[], Worker], *, identity: str, address: str = _LOCAL, workers: int | None = None, gpu: bool = False
    ) -> None:
        _use_token(os.environ.get("RAY_ADDRESS", "") if address == _LOCAL else address)
        try:
            import ray
        except ImportError as error:
            raise InputError("the ray executor needs Ray; pip install aqnfx[ray]") from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            self._connect(address)
        resources = self._ray.cluster_resources()
        have = int(resources.get("GPU" if gpu else "CPU", 0))
        self._workers = workers or max(1, have)
        if self._workers > have:
            self.close()
            raise InputError(f"{self._workers} workers asked; the Ray cluster has {have} {'GPUs' if gpu else 'CPUs'}")
        self._threads = max(1, int(resources.get("CPU", 1)) // self._workers)
        self._identity = identity
        self._build = ray.put(build)  # once; every worker on a machine reads the same copy
        options = {"num_gpus": 1, "num_cpus": 0} if gpu else {"num_cpus": 1}
        self._class = self._ray.remote(**options)(_Actor)

    def _connect(self, address: str) -> None:
        # Workers must not wait for each other's spinning threads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        where: dict[str, Any] = {"address": address}
        if address == _LOCAL:
            # Not Ray's own search: it stops at the address of a cluster that has ended since.
            where = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        try:
            try:
                self._ray.init(log_to_driver=False, logging_level="ERROR", **where)
            except ConnectionAbortedError:
                # The cluster answered and its server for this client did not start: Ray forks a process with gRPC threads,
                # which now and then ends at once. Another one does start.
                self._ray.init(log_to_driver=False, logging_level="ERROR", **where)
        except (ConnectionError, ValueError, RuntimeError, self._ray.exceptions.RayError) as error:
            aborted = isinstance(error, ConnectionAbortedError)  # its message is the server's traceback
            line = _last_line(str(error)) if aborted else (str(error).splitlines() or ["no answer"])[0]
            line = line.rstrip(".")
            asked = os.environ.get("RAY_ADDRESS", address) if address == _LOCAL else address
            raise InputError(
                f"the Ray cluster {asked!r} cannot be reached: {line}; check its address and client port, and, where it asks "
                "for a token, RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Run the units wherever a worker is free; the outcomes of a unit come together."""
        # Units are taken when somebody is free: what is wanted may depend on what came before.
        ray, waiting, again, lost = self._ray, iter(units), collections.deque[Unit](), 0
        actors = self._start(self._workers)
        busy: dict[Any, tuple[Any, Unit]] = {}
        idle = list(actors)
        try:
            while True:
                while idle and (unit := again.popleft() if again else next(waiting, None)) is not None:
                    actor = idle.pop()
                    busy[actor.run.remote(unit)] = (actor, unit)
                if not busy:
                    return
                (ready,), _ = ray.wait(list(busy), num_returns=1)
                actor, unit = busy.pop(ready)
                try:
                    found = ray.get(ready)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    lost += 1
                    if lost > LOST * self._workers:
                        raise ProbeError(f"{lost} Ray workers were lost, the last with: {str(error).splitlines()[0]}") from error
                    again.append(unit)
                    actors.remove(actor)
                    actors += self._start(1)
                    idle.append(actors[-1])
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise _original(error) from error
                idle.append(actor)
                yield from found
        finally:
            for actor in actors:
                ray.kill(actor)

    def _start(self, count: int) -> list[Any]:
        """Start workers, all at once; their graphs must be the driver's. None is left where one cannot be made."""
        ray, actors = self._ray, [self._class.remote(self._build, self._threads) for _ in range(count)]
        try:
            found = ray.get([actor.identity.remote() for actor in actors])
            if any(identity != self._identity for identity in found):
                raise ProbeError(
                    "a Ray worker has another graph or other weights than this process: the model's files, or the versions "
                    "of torch, transformers or aqnfx, differ there; make them the same"
                )
        except BaseException as error:
            for actor in actors:
                ray.kill(actor)
            if isinstance(error, ray.exceptions.RayTaskError):
                raise _original(error) from error
            if isinstance(error, ray.exceptions.RayActorError):
                raise ProbeError(f"a Ray worker could not be made: {_last_line(str(error))}") from error
            raise
        return actors

    def close(self) -> None:
        """Leave the cluster, if this executor joined it."""
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()


def _use_token(address: str) -> None:
    """Let Ray's client send the token of the user, if there is one, as ``ray start`` does; read when Ray is imported.

    Without it a cluster that asks for one never answers, and the client reports a timeout. Ray 2.60's client leaves it out
    unless RAY_AUTH_MODE says so (ray/_private/authentication/authentication_token_setup.py); a cluster that asks for none
    does not mind.
    """
    if not address.startswith("ray://") or "RAY_AUTH_MODE" in os.environ:
        return
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_MODE"] = "token"


def _original(error: Any) -> BaseException:
    """Return what a worker raised, so that bad input is one clear line wherever it was found."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, AqnfxError) else ProbeError(f"a Ray worker failed: {_last_line(str(error))}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
