import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.errors import DataError


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
