"""Signals ask a training to end: all ranks stop after the same step."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from types import FrameType, TracebackType

import torch
from torch import Tensor

from mlip_cli.distributed import all_max, world_size
from mlip_cli.terminal.output import warn

INTERRUPTED, TERMINATED = 130, 143
EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}


@dataclass(frozen=True)
class Asked:
    """What the ranks agreed on."""

    exit_code: int
    """Of the signal that ends the training; 0: it goes on."""
    save: bool

    @classmethod
    def by(cls, code: int) -> "Asked":
        """The largest of all ranks' numbers: 0 nothing, 1 a checkpoint, else the exit code of a signal."""
        return cls(exit_code=code if code > 1 else 0, save=code > 0)


class StopRequest:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 ask for an end after the step; a second SIGINT leaves at once."""

    def __init__(self, device: torch.device) -> None:
        self.exit_code = 0
        self._device = device
        self._answer: Callable[[], int] = lambda: 0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process, which ends with its parent
        if number == signal.SIGINT and self.exit_code:
            raise KeyboardInterrupt
        is_first, self.exit_code = not self.exit_code, EXIT_CODES[signal.Signals(number)]
        again = "; Ctrl-C again leaves without saving" if number == signal.SIGINT else ""
        if is_first:
            warn(f"{signal.Signals(number).name}: stopping after this step and saving{again}")

    def is_asked_for(self) -> bool:
        """True once a signal came to this rank."""
        return self.exit_code != 0

    def is_urgent(self) -> bool:
        """True once a signal came that a machine sent, which soon ends what goes on; Ctrl-C can be repeated."""
        return self.exit_code not in (0, INTERRUPTED)

    def agreed(self, *, save: bool, at_once: bool = False) -> Asked:
        """What the ranks ask for, the same on all of them: the end of the training, or a checkpoint.

        With one process: the current state. With several: the state at the last call, so that no rank waits for the
        device; the answer to this call comes with the next one.

        Args:
            save: this rank asks for a checkpoint.
            at_once: wait for the answer to this call.
        """
        own = self.exit_code or int(save)
        if world_size() == 1:
            return Asked.by(own)
        asked = all_max(torch.full((), own, device=self._device))
        earlier, self._answer = self._answer, fetched(asked)
        return Asked.by(self._answer() if at_once else earlier())


def fetched(x: Tensor) -> Callable[[], int]:
    """Copy a 0-d integer from the device; what is returned waits for it, and not for later work of the device."""
    if x.device.type != "cuda":
        return lambda: int(x)
    value = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    value.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(value)

    return read


GRACE_S = 3.0
"""For leaving in order, which takes no longer where nothing hangs."""
LOOK_EVERY_S = 1.0
"""At torchrun: a rank that lost it has nobody to end it."""

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_DONE = 0


@contextmanager
def sure_to_leave() -> Iterator[None]:
    """Within the block a Ctrl-C after another stop signal ends the process within `GRACE_S`, whatever it does.

    Under torchrun, which passes a second Ctrl-C on as SIGTERM, that counts too; where torchrun itself is gone, a rank
    gets SIGTERM.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _pipes.add(writing)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading,), name="second Ctrl-C", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writing, bytes([_DONE]))
        watch.join()
        _pipes.discard(writing)
        os.close(writing)
        os.close(reading)


_pipes: set[int] = set()
"""Pipes that a forked process must not write to: its signals are not ours."""


def _forget() -> None:
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def _watch(reading: int) -> None:
    is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    parent = os.getppid()
    seen: list[int] = []
    deadline: float | None = None
    while True:
        wait_s = LOOK_EVERY_S if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reading], [], [], wait_s if is_torchrun or deadline is not None else None)
        if not ready and deadline is not None:
            _end()
        if is_torchrun and os.getppid() != parent:
            parent = os.getppid()
            _signal_main_thread(signal.SIGTERM)
        for number in os.read(reading, 1024) if ready else b"":
            if number == _DONE:
                return
            if number == signal.SIGINT and seen:
                deadline = deadline or time.monotonic() + GRACE_S
            elif number == signal.SIGTERM and signal.SIGINT in seen and is_torchrun:
                _signal_main_thread(signal.SIGINT)
            if number in STOPS:
                seen.append(number)


def _signal_main_thread(number: signal.Signals) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


def _end() -> None:
    """Leave without a word to anything that may hang."""
    for child in active_children():
        child.kill()
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
    os.write(2, show_cursor + b"error: interrupted\n")
    os._exit(130)
