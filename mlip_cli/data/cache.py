"""A bounded folder of this machine for shards that lie elsewhere, shared by all processes here through file locks.

CACHE/lock              held by the one process that fetches or makes room
CACHE/KEY/in_use        locked, shared, by every process that reads the data set; its time is when it was last opened
CACHE/KEY/*.tar, *.idx  whole files: they get their names when they are complete and checked
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.config import Cache
from mlip_cli.terminal.output import say

GIB = 2**30


@dataclass(frozen=True)
class ShardCache:
    """The folder and the most bytes that its shards may take."""

    folder: Path
    most_bytes: int

    @classmethod
    def of(cls, config: Cache) -> "ShardCache":
        """The one that a recipe names, or the user's own."""
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlip"
        folder = own if config.folder is None else Path(config.folder).expanduser()
        return cls(folder.absolute(), int(config.gib * GIB))

    def hold(self, key: str) -> int:
        """Make the folder of a data set; its shards stay until the descriptor that comes back is closed.

        Raises:
            UsageError: it cannot be made, or the file system knows no locks.
        """
        with self._made(self.folder / key) as folder:
            descriptor = os.open(folder / "in_use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.utime(folder / "in_use")
        _lock(descriptor, fcntl.LOCK_SH, self.folder)
        return descriptor

    def subfolder(self, name: str) -> Path:
        """Make a folder in the cache for other files than shards, which nobody removes.

        Raises:
            UsageError: it cannot be made.
        """
        with self._made(self.folder / name) as folder:
            return folder

    @contextmanager
    def _made(self, folder: Path) -> Iterator[Path]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        except OSError as error:
            raise UsageError(
                f"data.cache.folder: {self.folder}: {error.strerror}; name a folder of this machine's own disk"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone at fetching and making room, among all processes of this machine; nothing half-fetched lies here."""
        with open(self.folder / "lock", "a", encoding="utf-8") as file:
            if not _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, self.folder):
                say(f"another process fetches into {self.folder}; waiting for it")
                _lock(file.fileno(), fcntl.LOCK_EX, self.folder)
            for torn in self.folder.glob("*/.*.tmp"):
                torn.unlink(missing_ok=True)
            yield

    def make_room(self, needed: int, *, key: str) -> None:
        """Remove the least recently used shards until `needed` bytes more fit; of `key` and of what is read none.

        To be called while `locked`.

        Raises:
            RunError: they do not fit, or not on the disk.
        """
        sizes = {tar: tar.stat().st_size for tar in self.folder.glob("*/*.tar")}
        excess = sum(sizes.values()) + needed - self.most_bytes
        with ExitStack() as held:
            unused = [folder for folder in self.folder.glob("*/") if folder.name != key and _is_unused(folder, held)]
            unused.sort(key=lambda folder: (folder / "in_use").stat().st_mtime_ns)
            for tar in [tar for folder in unused for tar in sorted(folder.glob("*.tar"))]:
                if excess > 0:
                    tar.unlink()
                    tar.with_suffix(".idx").unlink(missing_ok=True)
                    excess -= sizes.pop(tar)
        if excess > 0:
            raise RunError(
                f"data.cache.gib: {needed / GIB:.2f} GiB more do not fit into {self.folder} beside the "
                f"{sum(sizes.values()) / GIB:.2f} GiB that this and other runs read, of {self.most_bytes / GIB:g}; "
                "set it higher"
            )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise RunError(
                f"{self.folder}: {needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free on this disk; make room, or "
                "set data.cache.folder to a folder on another one"
            )


def _is_unused(folder: Path, held: ExitStack) -> bool:
    """No process reads the data set in `folder`, and until `held` is closed none begins to."""
    try:
        descriptor = os.open(folder / "in_use", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # another program's folder
        return False
    held.callback(os.close, descriptor)
    return _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, folder)


def _lock(descriptor: int, how: int, folder: Path) -> bool:
    """False when it is locked already and `how` says not to wait.

    Raises:
        UsageError: the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UsageError(
            f"data.cache.folder: {folder}: no file locks here; name a folder of this machine's own disk"
        ) from error
    return True
