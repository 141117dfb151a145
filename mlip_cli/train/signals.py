"""Signals set a flag, which travels with what a step sums over ranks anyway: all of them stop after the same step."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType, TracebackType

import torch
from torch import Tensor

from mlip_cli.distributed import all_sum, world_size
from mlip_cli.terminal.output import warn

INTERRUPTED, TERMINATED = 130, 143
EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}


class StopRequest:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 ask for an end after the step; a second SIGINT leaves at once."""

    def __init__(self, device: torch.device) -> None:
        self.exit_code = 0
        self._device = device
        self._wants_to_save = False
        self._votes: Callable[[], list[int]] | None = None
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

    def cast(self, *, save: bool) -> None:
        """Say what this rank wants after the coming step, besides stopping."""
        self._wants_to_save = save

    def ride(self, count: Tensor) -> Tensor:
        """`count` (0-d int64) summed over ranks; their votes travel with it in one all-reduce."""
        if world_size() == 1:
            return count
        own = [self._wants_to_save, self.exit_code == INTERRUPTED, self.exit_code == TERMINATED]
        summed = all_sum(torch.cat([count[None], torch.tensor(own, dtype=count.dtype, device=count.device)]))
        self._votes = fetched(summed[1:])
        return summed[0]

    def decision(self) -> tuple[int, bool]:
        """(exit code if any rank was asked to stop, else 0; whether any rank wants to save), the same on all ranks.

        Of one process it is what holds now, of several what held when their last votes rode.
        """
        if self._votes is None:
            return self.exit_code, self._wants_to_save
        save, interrupted, terminated = self._votes()
        return (TERMINATED if terminated else INTERRUPTED if interrupted else 0), save > 0

    def vote_again(self) -> None:
        """Votes that ride alone, for what came up after the step."""
        self.ride(torch.zeros((), dtype=torch.int64, device=self._device))


def fetched(x: Tensor) -> Callable[[], list[int]]:
    """Copies a few integers from the device; what is returned waits for them, and not for later work of the device."""
    if x.device.type != "cuda":
        return x.tolist
    values = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    values.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return values.tolist()

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
