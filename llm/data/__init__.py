"""Text to tokens to training blocks: `unmask data` prepares a data set, `TrainingStream` reads it."""

from llm.data.shards import TokenDataset
from llm.data.stream import DataConfig, SourceConfig, TrainingStream, open_datasets
from llm.data.tokenizers import TextTokenizer

__all__ = ["DataConfig", "SourceConfig", "TextTokenizer", "TokenDataset", "TrainingStream", "open_datasets"]
