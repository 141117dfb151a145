"""Signals set a flag, which travels with what a step sums over ranks anyway: all of them stop after the same step."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
from torch import Tensor

from mlip_cli.distributed import all_sum, world_size
from mlip_cli.output import warn

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
