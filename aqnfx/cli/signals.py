"""Signals that end a command: SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, and none gets lost."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from aqnfx import artifacts

AGAIN = 0.05
"""Seconds after which a signal that came at a bad moment is delivered once more."""
SAME = 1.0
"""Seconds in which further signals are taken for the first: `timeout` sends one to the process and one to its group."""
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Signals:
    """While this is entered, a signal that ends the process raises ``KeyboardInterrupt`` where the main thread is.

    ``number`` is the first signal that came, else None. Python raises in whatever runs at the moment: in a callback of a
    weak reference or a finaliser the exception is written to stderr and forgotten, so the signal is delivered again after it.
    While files are moved into place it waits. A second SIGTERM ends the process at once. Signals that the process was told
    to ignore stay ignored; outside of the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._when = 0.0
        self._repeated = False
        self._before: dict[int, Any] = {}
        self._hook: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hook is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now, repeated, self._repeated = time.monotonic(), self._repeated, False
        if self.number is None:
            self.number, self._when = number, now
        elif number != signal.SIGINT and not repeated:
            if now - self._when <= SAME:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if artifacts.moving():
            self._deliver_again()
            return
        raise KeyboardInterrupt

    def _unraisable(self, found: Any) -> None:
        if self.number is not None and issubclass(found.exc_type, KeyboardInterrupt):
            self._deliver_again()
        else:
            self._hook(found)

    def _deliver_again(self) -> None:
        self._timer = threading.Timer(AGAIN, self._send)
        self._timer.daemon = True
        self._timer.start()

    def _send(self) -> None:
        assert self.number is not None
        self._repeated = True
        # To the thread: a call that waits ends then, where interrupt_main would be seen after it.
        signal.pthread_kill(threading.main_thread().ident or 0, self.number)
