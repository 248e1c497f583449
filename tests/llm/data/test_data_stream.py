from pathlib import Path

import numpy as np
import pytest
from small_corpus import some_texts, write

from launch import config as configs
from launch.data import micro_batches
from launch.errors import ConfigError, DataError
from llm.data import DataConfig, SourceConfig, TextTokenizer, TrainingStream, open_datasets
from llm.data.tokenizers import train_bpe


@pytest.fixture
def config(tmp_path: Path, bpe: TextTokenizer) -> DataConfig:
    write(tmp_path / "large", bpe, {"large": some_texts(80, seed=1)})
    write(tmp_path / "small", bpe, {"small": some_texts(20, seed=2)})
    return DataConfig(
        sources=(
            SourceConfig(path=str(tmp_path / "large"), weight=3),
            SourceConfig(path=str(tmp_path / "small"), weight=1),
        ),
        block_length=16,
        seed=4,
    )


def test_a_stream_reads_every_block_of_a_source_once_per_epoch_of_it(config: DataConfig) -> None:
    stream = TrainingStream(config)
    large, small = stream.datasets
    rows = stream.blocks(np.arange(4 * len(small)))
    known = {tuple(block) for block in small.blocks(range(len(small))).tolist()}
    from_small = [tuple(row) for row in rows.tolist() if tuple(row) in known]
    assert sorted(from_small) == sorted(tuple(block) for block in small.blocks(range(len(small))).tolist())
    assert stream.epochs(4 * len(small)) == pytest.approx([3 * len(small) / len(large), 1.0])


def test_ranks_and_restarts_see_the_same_blocks(config: DataConfig) -> None:
    alone = TrainingStream(config).blocks(np.arange(48, 72))
    resumed = TrainingStream(config)
    for rank in range(3):
        parts = micro_batches(2, global_batch=24, micro_batch=4, rank=rank, world_size=3)
        for part in parts:
            assert (resumed.blocks(part) == alone[part - 48]).all()


def test_the_fingerprint_tells_streams_apart(config: DataConfig) -> None:
    same = TrainingStream(config).fingerprint
    assert TrainingStream(config).fingerprint == same
    first, second = config.sources
    for other in (
        DataConfig(sources=config.sources, block_length=16, seed=5),
        DataConfig(sources=config.sources, block_length=8, seed=4),
        DataConfig(sources=(second, first), block_length=16, seed=4),
        DataConfig(sources=(first,), block_length=16, seed=4),
    ):
        assert TrainingStream(other).fingerprint != same


def test_data_sets_of_different_tokenizers_do_not_mix(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "other", train_bpe(some_texts(200), 280), {"other": some_texts(20)})
    mixed = DataConfig(sources=(config.sources[0], SourceConfig(path=str(tmp_path / "other"))), block_length=16)
    with pytest.raises(DataError, match=r"different tokenizers \(300 and 280 entries\); prepare both with --tokenizer"):
        open_datasets(mixed, "train")


def test_a_configuration_loads_from_yaml_and_is_checked(config: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(configs.dump(config))
    loaded, _ = configs.load(DataConfig, file)
    assert loaded == config
    for text, match in (
        ("sources: []", "sources is empty"),
        ("sources: [{path: a, weight: 0}]", "weight is 0"),
        ("sources: [{path: ''}]", "path is empty"),
        ("{sources: [{path: a}], block_length: 0}", "block_length is 0"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=match):
            configs.load(DataConfig, file)
