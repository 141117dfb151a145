"""Signals ask a training to end: all ranks stop after the same step."""

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType

import torch

from mlip_cli.devices import fetched
from mlip_cli.distributed import all_max, signal_at_death_of_parent, world_size
from mlip_cli.terminal.output import draws, error_console, warn

INTERRUPTED, TERMINATED = 130, 143
EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}


@dataclass(frozen=True)
class Asked:
    """What the ranks agreed on."""

    exit_code: int
    """The exit code of the signal that ends the training; 0: it goes on."""
    save: bool

    @classmethod
    def by(cls, code: int) -> "Asked":
        """The largest of all ranks' numbers: 0 nothing, 1 a checkpoint, else an exit code, with a checkpoint too."""
        return cls(exit_code=code if code > 1 else 0, save=code > 0)


class StopRequest:
    """Within the block SIGINT, SIGTERM and SIGUSR1 ask for an end after the step.

    After the first Ctrl-C the system's own handler is active, so a second Ctrl-C kills the process at once.
    torchrun sends SIGTERM for the second Ctrl-C; if torchrun dies, its ranks get SIGTERM.
    """

    def __init__(self, device: torch.device) -> None:
        self.exit_code = 0
        self._device = device
        self._answer: Callable[[], int] = lambda: 0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, object] = {}
        self._is_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> "StopRequest":
        for number in EXIT_CODES:
            self._previous[number] = signal.signal(number, self._note)
        reset_by_system(signal.SIGINT)
        if self._is_torchrun:
            signal_at_death_of_parent(signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process, which ends with its parent
        is_first, self.exit_code = not self.exit_code, EXIT_CODES[signal.Signals(number)]
        again = ""
        if number == signal.SIGINT:
            again = "; Ctrl-C again leaves without saving"
            for returned in (signal.SIGINT, signal.SIGTERM) if self._is_torchrun else (signal.SIGINT,):
                signal.signal(returned, signal.SIG_DFL)
                self._previous.pop(returned, None)  # also while the run is closed
            if draws():
                error_console().show_cursor()  # nobody else does where the system ends the process
        if is_first:
            last_step = "this step" if world_size() == 1 else "the next step"  # ranks agree one step later
            warn(f"{signal.Signals(number).name}: stopping after {last_step} and saving{again}")

    def is_asked_for(self) -> bool:
        """True once a signal came to this rank."""
        return self.exit_code != 0

    def is_urgent(self) -> bool:
        """True once a scheduler's signal came, which allows little time; Ctrl-C can be repeated."""
        return self.exit_code not in (0, INTERRUPTED)

    def agreed(self, *, save: bool, at_once: bool = False) -> Asked:
        """What the ranks ask for, the same on all of them: the end of the training, or a checkpoint.

        With one process: the current state. With several ranks this returns the answer to the previous call, so that no
        rank waits for the device.

        Args:
            save: this rank asks for a checkpoint.
            at_once: wait for the answer to this call.
        """
        if world_size() == 1:
            return Asked.by(self.exit_code or int(save))
        earlier = Asked.by(0 if at_once else self._answer())
        own = self.exit_code or int(save and not earlier.save)  # the earlier answer leads to a checkpoint already
        answer = fetched(all_max(torch.full((), own, device=self._device)))
        self._answer = (lambda: 0) if at_once else answer
        return Asked.by(answer()) if at_once else earlier


def reset_by_system(number: signal.Signals) -> None:
    """Have the system drop our handler at its first call (SA_RESETHAND), even if Python is stuck in C code.

    Only glibc has the call; elsewhere Python drops the handler itself, as soon as it runs again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sysv_signal"):
        libc.signal.argtypes = libc.sysv_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal.restype = ctypes.c_void_p
        libc.sysv_signal(number, libc.signal(number, signal.SIG_IGN))
