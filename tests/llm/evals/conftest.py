from collections.abc import Iterator

import pytest

from launch import runtime as runtimes
from launch.runtime import Runtime


@pytest.fixture
def cpu_runtime() -> Iterator[Runtime]:
    runtime = runtimes.start(device="cpu")
    yield runtime
    runtime.close()
