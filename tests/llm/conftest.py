from pathlib import Path

import pytest

from tests.runs import Tiny, train, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each family; that of prime keeps an average of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "ar": train(tiny.ar, 1, folder / "ar"),
        "mdm": train(tiny.mdm, 1, folder / "mdm"),
        "prime": train(tiny.prime, 1, folder / "prime", "engine.ema_decay=0.5"),
    }
