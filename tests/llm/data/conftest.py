import pytest
from small_corpus import some_texts

from llm.data.tokenizers import TextTokenizer, train_bpe


@pytest.fixture(scope="session")
def bpe() -> TextTokenizer:
    return train_bpe(some_texts(200), 300)
