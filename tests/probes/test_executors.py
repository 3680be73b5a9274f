"""Where items are run changes no number: threads and Ray workers give the map of one process, and survive losses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aqnfx.diagnosis.diagnose import executor_for, run
from aqnfx.diagnosis.options import Options
from aqnfx.diagnosis.probe_choice import prepare_probes
from aqnfx.diagnosis.workers import Recipe, instrument
from aqnfx.errors import InputError, ProbeError
from aqnfx.probes.executors import InProcess, Threads
from aqnfx.probes.measure import measure
from aqnfx.probes.measurements import Measurements
from aqnfx.probes.work import Outcome, Sweep, Worker
from tests.cli.tiny import TEXT, save_model

QUICK: dict[str, Any] = {
    "samples": 5, "seeds": 2, "levels": (0.1, 0.3), "max_length": 16, "window": 2, "compile": "no", "batch_size": 3,
    "method": "measure", "probes": ("operator", "layer"),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def alone(directory: Path) -> Measurements:
    return run(directory, TEXT, Options(**QUICK))


def same(a: Measurements, b: Measurements) -> bool:
    return a.probes == b.probes and all(np.array_equal(a.scores[m], b.scores[m]) for m in a.scores)


class Setup:
    """A sweep made ready, with the recipe for its workers."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.options = Options(**QUICK, **changes)
        ready = prepare_probes(directory, TEXT, self.options, tell=lambda _: None)
        seeds = tuple(range(self.options.seeds))
        self.sweep = Sweep(
            probes=ready.probes, levels=self.options.levels, seeds=seeds, base_level=self.options.base, task="kl"
        )
        self.recipe = Recipe.of(directory, ready, self.options, self.sweep, "none")
        self.program, self.engine, self.batches = instrument(ready, self.options, self.sweep, "none")

    def measure(self, executor: Any, **more: Any) -> Measurements:
        return measure(self.program, self.engine, self.batches, self.sweep, executor=executor, **more)


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_threads_give_what_one_process_gives(directory: Path, alone: Measurements) -> None:
    setup, seen = Setup(directory), []

    def watched(number: int) -> Worker:
        worker = setup.recipe("cpu")
        inner = worker.run

        def spied(items: Any) -> Iterator[Outcome]:
            seen.append(number)
            if number == 0:
                started.set()
            else:
                started.wait(900)  # so that the first worker gets something to do
            return inner(items)

        worker.run = spied  # type: ignore[method-assign]
        return worker

    started = threading.Event()
    found = setup.measure(Threads([watched(0), watched(1)]))
    assert same(found, alone)
    assert set(seen) == {0, 1}
    assert found.complete


def test_an_error_of_one_thread_ends_the_run(directory: Path) -> None:
    setup = Setup(directory)
    good, bad = setup.recipe("cpu"), setup.recipe("cpu")

    def broken(_items: Any) -> Iterator[Outcome]:
        raise ProbeError("the device is gone")
        yield

    bad.run = broken  # type: ignore[method-assign]
    with pytest.raises(ProbeError, match="the device is gone"):
        setup.measure(Threads([good, bad]))
    assert threading.active_count() < 20


def test_an_interruption_keeps_what_threads_have_finished(directory: Path) -> None:
    setup = Setup(directory)

    def interrupt(done: int, _total: int) -> None:
        if done == 21:
            raise KeyboardInterrupt

    found = setup.measure(Threads([setup.recipe("cpu")]), progress=interrupt)
    assert not found.complete
    assert found.samples == 3


@pytest.mark.slow
def test_workers_can_be_made_twice_from_a_module(directory: Path, alone: Measurements) -> None:
    from aqnfx.graph.loading import load_model
    from aqnfx.probes.data.samples import load_tokenizer

    model, options = load_model(str(directory)), Options(**QUICK)
    ready = prepare_probes(model, TEXT, options, tokenizer=load_tokenizer(str(directory)), tell=lambda _: None)
    recipe = Recipe.of(model, ready, options, Setup(directory).sweep, "none")
    first, second = recipe("cpu"), recipe("cpu")
    assert next(first.program.module.parameters()).data_ptr() != next(second.program.module.parameters()).data_ptr()
    assert next(iter(model.parameters())).data_ptr() != next(first.program.module.parameters()).data_ptr()
    found = measure(first.program, first.engine, first.batches, first.sweep, executor=InProcess(second))
    assert same(found, alone)


@pytest.mark.slow
def test_choices_that_cannot_work_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="executor 'cluster' is not one of process, devices, ray, ray://HOST:PORT"):
        Options(executor="cluster")
    with pytest.raises(InputError, match="workers 2 needs executor devices or ray"):
        Options(workers=2)
    monkeypatch.setattr("aqnfx.diagnosis.diagnose.accelerators", lambda: ())
    with pytest.raises(InputError, match="this machine has no accelerator; leave the option out"):
        run(directory, TEXT, Options(**QUICK, executor="devices"))
    monkeypatch.setattr("aqnfx.diagnosis.diagnose.accelerators", lambda: ("cpu", "cpu"))
    assert run(directory, TEXT, Options(**QUICK, executor="devices")).complete
    with pytest.raises(InputError, match="there is no device"):
        Threads([])
    import aqnfx

    program = aqnfx.trace(str(directory))
    with pytest.raises(InputError, match="which needs its directory or module; a Program was given"):
        run(program, TEXT, Options(**QUICK, executor="devices"))


def test_without_ray_the_message_says_what_to_install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install aqnfx\[ray\]"):
        run(directory, TEXT, Options(**QUICK, executor="ray"))


# Ray -----------------------------------------------------------------------------------------------------------------


# How long Ray waits for its own parts: by default less than they may take to start on a busy machine.
PATIENCE = {
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "900",
    "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "900",
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "900",
    "RAY_gcs_server_request_timeout_seconds": "900",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_health_check_timeout_ms": "900000",
}
ATTEMPTS = 8  # a node that takes more than 30 s to start gives up, whatever is asked of it


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of this machine with two workers, which the executors below join."""
    ray = pytest.importorskip("ray", reason="ray is absent: the extra aqnfx[ray] is not installed")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        for left in reversed(range(ATTEMPTS)):
            try:
                # "local": without it Ray looks for the last cluster of this machine first, and fails when that one has ended.
                ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                break
            except Exception:
                ray.shutdown()
                if not left:
                    raise
        yield ray
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answering(command: list[str], environment: dict[str, str], port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a server, again where it ends, and return it once its port answers, however long that takes."""
    for _ in range(ATTEMPTS):
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                return process
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The client address of a Ray cluster in processes of its own, which asks for a token, and what its clients need."""
    pytest.importorskip("ray", reason="ray is absent: the extra aqnfx[ray] is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as place:  # a short path: sockets are made in it
        client = {**os.environ, **PATIENCE, "RAY_TMPDIR": place, "RAY_AUTH_TOKEN": "0" * 64}
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        start += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--ray-client-server-port={port}"]
        start += ["--include-dashboard=false", "--disable-usage-stats"]
        # Without gRPC's fork handlers: with them, one client's server in four ends at its start on a busy machine.
        there = {**client, "RAY_AUTH_MODE": "token", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        process = answering(start, there, port, tmp_path / "head.txt")
        try:
            yield f"ray://127.0.0.1:{port}", client
        finally:
            process.terminate()
            process.wait(900)


@pytest.mark.slow
def test_a_cluster_elsewhere_is_joined_as_client(
    head: tuple[str, dict[str, str]], directory: Path, alone: Measurements, tmp_path: Path
) -> None:
    address, environment = head
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from aqnfx.diagnosis.diagnose import run\n"
        "from aqnfx.diagnosis.options import Options\n"
        "model, text, options = json.loads(sys.argv[1])\n"
        "for name in ('levels', 'probes'): options[name] = tuple(options[name])\n"
        "found = run(model, text, Options(**options))\n"
        "print(json.dumps({name: scores.tolist() for name, scores in found.scores.items()}))\n"
    )
    options = {**QUICK, "executor": address, "workers": 2}
    process = subprocess.run(
        [sys.executable, str(script), json.dumps([str(directory), TEXT, options])],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    scores = json.loads(process.stdout.splitlines()[-1])
    assert scores.keys() == alone.scores.keys()
    assert all(
        np.array_equal(np.array(values, alone.scores[name].dtype), alone.scores[name])
        for name, values in scores.items()
    )


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("token", [None, "RAY_AUTH_TOKEN"])
def test_a_cluster_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, named: bool
) -> None:
    pytest.importorskip("ray", reason="ray is absent: the extra aqnfx[ray] is not installed")
    from aqnfx.probes.ray_executor import RayExecutor

    def silent(address: str | None = None, **_: Any) -> None:
        assert address == (None if named else "ray://nowhere:10001")
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr("ray.init", silent)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no token of the user's
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    if token:
        monkeypatch.setenv(token, "0" * 64)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:10001")
    with pytest.raises(
        InputError, match=r"^the Ray cluster 'ray://nowhere:10001' cannot be reached: ray client conn.*; check"
    ):
        RayExecutor(lambda: None, identity="", address="ray" if named else "ray://nowhere:10001")  # type: ignore[arg-type,return-value]
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if token else None)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_server_that_does_not_start_is_asked_twice(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    pytest.importorskip("ray", reason="ray is absent: the extra aqnfx[ray] is not installed")
    from aqnfx.probes.ray_executor import RayExecutor

    calls = []

    def failing(**where: Any) -> None:
        calls.append(where["address"])
        if len(calls) <= failures:
            raise ConnectionAbortedError(
                "Initialization failure from server:\nTraceback\nRuntimeError: Starting failed.\n\n"
            )

    monkeypatch.setattr("ray.init", failing)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if failures == 1:
        RayExecutor(lambda: None, identity="", address="ray://there:10001")  # type: ignore[arg-type,return-value]
    else:
        with pytest.raises(
            InputError, match="'ray://there:10001' cannot be reached: RuntimeError: Starting failed; check"
        ):
            RayExecutor(lambda: None, identity="", address="ray://there:10001")  # type: ignore[arg-type,return-value]
    assert calls == ["ray://there:10001"] * 2


@pytest.mark.parametrize(
    ("fails", "identity", "message"),
    [(True, "the same", "could not be made"), (False, "another", "another graph or other weights")],
)
def test_workers_start_together_and_none_is_left_where_one_cannot_be_made(
    fails: bool, identity: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="ray is absent: the extra aqnfx[ray] is not installed")
    from aqnfx.probes.ray_executor import RayExecutor

    events: list[str] = []

    class Made:
        def __init__(self, *_given: Any) -> None:
            events.append("made")
            self.identity, self.remote = self, lambda: "the same"

    def get(found: list[str]) -> list[str]:
        events.append("asked")
        if fails:
            raise ray.exceptions.RayActorError
        return found

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.remote", lambda **_options: lambda _kind: types.SimpleNamespace(remote=Made))
    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.kill", lambda _actor: events.append("killed"))
    executor = RayExecutor(lambda: None, identity=identity, workers=2)  # type: ignore[arg-type,return-value]
    with pytest.raises(ProbeError, match=message):
        list(executor.run([]))
    assert events == ["made", "made", "asked", "killed", "killed"]


# Ray opens files and sockets that it closes when the process ends.
quiet = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::FutureWarning"
)


class Deadly:
    """Makes workers of which one is killed in its second unit, the first time."""

    def __init__(self, recipe: Recipe, mark: Path, *, always: bool = False) -> None:
        self.recipe, self.mark, self.always = recipe, mark, always

    def __call__(self) -> Worker:
        worker, units = self.recipe("cpu"), []
        inner = worker.run

        def run(items: Any) -> Iterator[Outcome]:
            units.append(items)
            if self.always or (len(units) == 2 and not self.mark.exists()):
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(items)

        worker.run = run  # type: ignore[method-assign]
        return worker


@pytest.mark.slow
@quiet
def test_ray_gives_what_one_process_gives_and_replaces_a_killed_worker(
    cluster: Any, directory: Path, alone: Measurements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aqnfx.probes.ray_executor import RayExecutor, identity_of

    setup = Setup(directory, executor="ray", workers=2)
    identity = identity_of(setup.program)
    mark = tmp_path / "killed"
    with executor_for(Deadly(setup.recipe, mark), setup.program, setup.options) as executor:  # type: ignore[arg-type]
        assert same(setup.measure(executor), alone)
    assert mark.exists()
    assert cluster.is_initialized()  # it was not this executor that started it

    monkeypatch.setattr("aqnfx.probes.ray_executor.LOST", 0)
    hopeless = RayExecutor(Deadly(setup.recipe, mark, always=True), identity=identity, workers=1)
    with pytest.raises(ProbeError, match="1 Ray workers were lost"):
        setup.measure(hopeless)


@pytest.mark.slow
@quiet
def test_ray_misuse_is_refused(cluster: Any, directory: Path) -> None:
    from aqnfx.probes.ray_executor import RayExecutor, identity_of

    setup = Setup(directory, executor="ray", workers=1)
    with pytest.raises(InputError, match="3 workers asked; the Ray cluster has 2 CPUs"):
        RayExecutor(setup.recipe, identity="", workers=3)
    weight = next(setup.program.module.parameters())
    before = identity_of(setup.program)
    with torch.no_grad():
        weight[0, 0] += 1.0
    assert identity_of(setup.program) != before  # the same graph, one other weight
    other = RayExecutor(setup.recipe, identity=identity_of(setup.program), workers=1)
    with pytest.raises(ProbeError, match="another graph or other weights than this process"):
        setup.measure(other)
