"""A disk of its own (a tmpfs) that is small, or cannot be written. Needs root."""

import errno
import os
import subprocess
from pathlib import Path


class Disk:
    """Mounted on `folder` for the length of a context. `options` are those of mount: size=16m, ro."""

    def __init__(self, folder: Path, options: str) -> None:
        self.folder, self.options = folder, options
        self._ballast = folder / "ballast"

    def __enter__(self) -> "Disk":
        self.folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self.folder))

    def fill(self, *, left: int) -> None:
        """Until no more than `left` bytes are free. `empty` gives them back."""
        with self._ballast.open("wb", buffering=0) as file:
            while (room := self._free() - left) > 0:
                try:
                    file.write(bytes(min(room, 2**16)))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return  # others write here too

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def _free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)
