"""Signals set a flag; the loop reads it between steps."""

import os
import signal
from types import FrameType, TracebackType

import torch

from mlip_cli.distributed import all_sum, world_size
from mlip_cli.output import warn

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class StopRequest:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 ask for an end after the step; a second SIGINT leaves at once."""

    def __init__(self, device: torch.device) -> None:
        self.exit_code = 0
        self._device = device
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
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        again = "; Ctrl-C again leaves without saving" if number == signal.SIGINT else ""
        warn(f"{signal.Signals(number).name}: stopping after this step and saving{again}")

    def is_asked_for(self) -> bool:
        """True once a signal came to this rank."""
        return self.exit_code != 0

    def is_urgent(self) -> bool:
        """True once a signal came that a machine sent, which soon ends what goes on; Ctrl-C can be repeated."""
        return self.exit_code not in (0, EXIT_CODES[signal.SIGINT])

    def agree(self, *, save: bool) -> tuple[int, bool]:
        """(exit code if any rank was asked to stop, else 0; whether any rank wants to save), the same on all ranks."""
        if world_size() == 1:
            return self.exit_code, save
        votes = torch.zeros(256, device=self._device)
        votes[0] = save
        if self.exit_code:
            votes[self.exit_code] = 1
        found = all_sum(votes).nonzero().flatten().tolist()
        return max(found, default=0), 0 in found
