"""A small disk of its own, that can be filled: a tmpfs. Needs root and the right to mount."""

import os
import subprocess
from pathlib import Path

_PAGE = 4096


class Disk:
    """Mounted on `folder` for the length of a context."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._ballast = folder / "ballast"

    def __enter__(self) -> "Disk":
        self.folder.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self.folder))

    def fill(self, *, left: int) -> None:
        """Until about `left` bytes are free. `empty` gives them back."""
        free = os.statvfs(self.folder).f_bavail * _PAGE
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT)
        try:
            os.posix_fallocate(descriptor, 0, max(_PAGE, free - left))
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)
