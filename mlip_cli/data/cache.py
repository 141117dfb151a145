"""The cache: a folder of this machine for fetched shards and for the indexes of tars that mlip did not write.

CACHE/lock              held by the one process that writes here
CACHE/tars/             indexes of tars
CACHE/KEY/url           where the shards of this folder come from
CACHE/KEY/*.tar, *.idx  whole files: a file gets its name when it is complete and checked

All processes of the machine share it. mlip deletes only files that a killed process left half-written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import GIB, free_bytes, lock
from mlip_cli.paths import read_path, read_variable
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import say, size_in_words

LOCAL = "name a folder on a local disk of this machine"


@dataclass(frozen=True)
class ShardCache:
    """The folder, and the most bytes that its shards may take."""

    folder: Path
    most_bytes: int

    @classmethod
    def of(cls, config: Cache) -> "ShardCache":
        """The cache that a recipe names, or the user's own.

        Raises:
            UsageError: the recipe names none, and this account has no home folder.
        """
        folder = own_folder() if config.folder is None else Path(config.folder)
        return cls(folder.absolute(), int(config.gib * GIB))

    def subfolder(self, name: str) -> Path:
        """Make a folder in the cache.

        Raises:
            UsageError: it cannot be made.
        """
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Write here alone among all processes of this machine; half-written files of killed ones are gone.

        Raises:
            UsageError: the file system has no locks.
        """
        with open(self.folder / "lock", "a", encoding="utf-8") as file:
            try:
                lock(file, when_held=lambda: say(f"another process writes to {self.folder}; waiting for it"))
            except OSError as error:
                raise self._unusable(error) from error
            for torn in self.folder.glob("*/.*.tmp"):
                torn.unlink(missing_ok=True)
            yield

    def check_room(self, needed: int) -> None:
        """See that `needed` bytes more fit.

        Raises:
            RunError: they exceed `data.cache.gib`, or the disk. The message says what may be deleted.
        """
        sizes = {folder: sum(tar.stat().st_size for tar in folder.glob("*.tar")) for folder in self.folder.glob("*/")}
        if (present := sum(sizes.values())) + needed > self.most_bytes:
            folders = ", ".join(f"{_in_words(folder)}, {size_in_words(size)}" for folder, size in sizes.items() if size)
            raise RunError(
                f"data.cache.gib: {self.folder} holds {size_in_words(present)} of shards, and {size_in_words(needed)} "
                f"more exceed the {self.most_bytes / GIB:g} allowed; set it higher, or delete folders that no run "
                f"reads ({folders})"
            )
        free = free_bytes(self.folder)
        if needed > free:
            raise RunError(
                f"{self.folder}: {size_in_words(needed)} needed, {size_in_words(free)} free on this disk; make room, "
                "or set data.cache.folder to a folder on another one"
            )

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(f"data.cache.folder: {self.folder}: {error.strerror}; {LOCAL}")


def own_folder() -> Path:
    """The user's own cache.

    Raises:
        UsageError: this account has no home folder.
    """
    if own := read_variable("XDG_CACHE_HOME"):
        return Path(own, "mlip")
    try:
        return Path(read_path("~"), ".cache", "mlip")
    except UsageError:
        what = "this account has no home folder for a cache"
        raise UsageError(f"data.cache.folder: {what}; set it, or $XDG_CACHE_HOME, to a folder") from None


def _in_words(folder: Path) -> str:
    """`KEY from URL`, or `KEY` where an older version fetched it."""
    url = folder / "url"
    return f"{folder.name} from {url.read_text().strip()}" if url.is_file() else folder.name
