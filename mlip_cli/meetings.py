"""Ranks wait for each other without a collective, in the store that they found each other by."""

import itertools
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from mlip_cli.errors import RunError


class MeetingPlace:
    """A count in the store for each wait.

    It needs no more network than the ranks have. Backends of collectives choose an address of their own, which on
    several nodes may be the wrong one.

    torchrun keeps one store when it starts all ranks again, so the ranks first agree on a name that no earlier attempt
    had: each calls under a name of its own, and rank 0 answers every call with the common name until all have it.

    Args:
        store: of all ranks. most: the longest wait for the ranks to come.

    Raises:
        RunError: a rank did not come.
    """

    LOOK_EVERY_S = 0.05

    def __init__(self, store: dist.Store, rank: int, world_size: int, most: timedelta) -> None:
        self.rank, self.world_size = rank, world_size
        self.numbers = itertools.count()
        deadline = time.monotonic() + most.total_seconds()
        with _store_named():
            name = self._greet(store, most, deadline) if rank == 0 else self._call(store, most, deadline)
        self.store = dist.PrefixStore(name, store)
        """Holds nothing of earlier attempts."""

    def _greet(self, store: dist.Store, most: timedelta, deadline: float) -> str:
        own, others = uuid.uuid4().hex, range(1, self.world_size)
        while missing := [other for other in others if _read(store, f"heard/{other}") != own]:
            if time.monotonic() > deadline:
                raise self._did_not_come(missing, most)
            for other in missing:
                store.set(f"answer/{other}", f"{_read(store, f'call/{other}')} {own}")
            time.sleep(self.LOOK_EVERY_S)
        return own

    def _call(self, store: dist.Store, most: timedelta, deadline: float) -> str:
        own = uuid.uuid4().hex
        store.set(f"call/{self.rank}", own)
        while not (answer := _read(store, f"answer/{self.rank}")).startswith(f"{own} "):
            if time.monotonic() > deadline:
                raise self._did_not_come([0], most)
            time.sleep(self.LOOK_EVERY_S)
        name = answer.removeprefix(f"{own} ")
        store.set(f"heard/{self.rank}", name)
        return name

    def wait(self, most: timedelta) -> None:
        """Return when all ranks have called it as often as this one.

        Raises:
            RunError: after `most`; it names the ranks that did not come. Or the store is gone.
        """
        number, deadline = next(self.numbers), time.monotonic() + most.total_seconds()
        here, seen = f"{number}/here", f"{number}/seen"
        with _store_named():
            self.store.set(f"{here}/{self.rank}", "")
            self.store.add(here, 1)
            missing: list[int] = []
            if not self._all(here, deadline):
                missing = [other for other in range(self.world_size) if not self.store.check([f"{here}/{other}"])]
            self.store.add(seen, 1)
            if missing:
                raise self._did_not_come(missing, most)
            if self.rank == 0:  # it may hold the store, so it leaves when nobody asks for this wait any more
                self._all(seen, deadline)

    def _all(self, what: str, deadline: float) -> bool:
        """Whether all ranks have counted themselves for `what` by `deadline`, a reading of the monotonic clock."""
        while self.store.add(what, 0) < self.world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(self.LOOK_EVERY_S)
        return True

    def _did_not_come(self, missing: list[int], most: timedelta) -> RunError:
        return RunError(
            f"rank {', '.join(map(str, missing))} of {self.world_size} did not come within {most}; look at what it "
            "printed, and whether its node is up"
        )


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


@contextmanager
def _store_named() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise RunError(f"the store that the ranks met by does not answer: {error}; is its node up?") from error
