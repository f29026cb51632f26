"""One run at a time in a folder: a lock of the file system, which ends with the process that holds it.

A POSIX record lock: a killed run leaves none behind, and the workers of its data loader, which may outlive it by
seconds, never have it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Of the names that push_to_hub leaves out: to read the file, as an upload does, would let the lock go, as POSIX has it
# for any handle that its process closes; and it says on which machine the run is.
LOCK = "_lock"
# By process, too: a fork inherits the set, but no lock.
_held: set[tuple[int, Path]] = set()


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Hold the folder, which is made where it is missing, against every other process; nested calls share one lock.

    Raises ValueError where another process holds it, naming that, or where the folder cannot be written. A file
    system without locks (some of NFS) is a warning.

        with alone_in("runs/mine"):
            trainer.train()
    """
    path = Path(folder).resolve() / LOCK
    mine = os.getpid(), path
    if mine in _held:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not emptied: the name of who holds it stands in it.
        file = path.open("a+")
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written: {error.strerror}; give another") from error
    with file:
        try:
            if fcntl is None:
                raise OSError("no such locks on this system")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"output_dir {folder}: another run writes there ({file.read().strip() or 'unknown'}); wait for its "
                "end, or take another output_dir"
            ) from None
        except OSError as error:
            logger.warning("%s knows no locks (%s): see to it yourself that no second run writes there", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(mine)
        try:
            yield
        finally:
            _held.discard(mine)
