import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import DataError

# Before torch is imported. Its threads wait for each other in busy loops, so that on a machine with other work every
# small operation of a test takes ten times as long with two threads as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def fetched() -> Callable[[Callable[[Any], Path], Any], Path]:
    """Look up something fetched, or skip; with UNMASK_REQUIRE_DATA=1 a missing part is a failure."""

    def look_up(folder_of: Callable[[Any], Path], name: Any) -> Path:
        try:
            return folder_of(name)
        except DataError as error:
            if os.environ.get("UNMASK_REQUIRE_DATA") == "1":
                raise
            pytest.skip(str(error))

    return look_up
