import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_corpus import some_texts

from launch.errors import DataError
from llm.data.tokenizers import TextTokenizer, train_bpe


@pytest.fixture(scope="session")
def bpe() -> TextTokenizer:
    return train_bpe(some_texts(200), 300)


@pytest.fixture
def fetched() -> Callable[[Callable[[str], Path], str], Path]:
    """Look up something fetched, or skip; with UNMASK_REQUIRE_DATA=1 a missing part is a failure."""

    def look_up(folder_of: Callable[[str], Path], name: str) -> Path:
        try:
            return folder_of(name)
        except DataError as error:
            if os.environ.get("UNMASK_REQUIRE_DATA") == "1":
                raise
            pytest.skip(str(error))

    return look_up
