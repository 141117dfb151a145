"""The parts that one of several machines prepares."""

import re
from dataclasses import dataclass

from mlip_cli.errors import UsageError

ALL_PARTS = "run the same command without --finish, or with --part 1/N to --part N/N on N machines"
"""What to do before --finish."""


@dataclass(frozen=True)
class Share:
    """The parts that one of several machines prepares: every `count`-th, from number `index` - 1 on."""

    index: int
    """From 1 to `count`."""
    count: int

    @classmethod
    def read(cls, text: str) -> "Share":
        """`2/3` -> the second of three shares.

        Raises:
            UsageError: it is not a share.
        """
        found = re.fullmatch(r"0*([1-9]\d{0,5})/0*([1-9]\d{0,5})", text)
        if found is None or int(found[1]) > int(found[2]):
            raise UsageError(f"--part {text}: not a share; the shares of three machines are 1/3, 2/3 and 3/3")
        return cls(int(found[1]), int(found[2]))

    def has(self, number: int) -> bool:
        """Whether the part of this number belongs to it."""
        return number % self.count == self.index - 1

    @property
    def lock_name(self) -> str:
        return f"part-{self.index}-of-{self.count}.lock"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


EVERYTHING = Share(1, 1)
