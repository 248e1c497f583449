"""Scores on disk: append-only files that a killed evaluation goes on from, at any number of processes.

    CACHE/
      <identity>/                   the first 32 digits of the sha256 of what follows
        identity.json               fingerprint of the model and all settings that scores depend on
        rank-00000.jsonl            a score a line, written as it is known; every rank reads the files of all

Another checkpoint, estimator, seed or tokenizer has another folder, so that a cache cannot serve what it should not. A
line that a kill has cut short is passed over, and that score is computed again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.errors import DataError
from llm.evals.scoring import Request, Score


class ScoreCache:
    """Scores of one model under one set of settings. Opened by every rank; each appends to a file of its own."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int) -> None:
        text = json.dumps(identity, sort_keys=True, indent=1)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_identity(text, rank)
        self._scores: dict[str, Score] = {}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                self._read(line)
        mine = self.folder / f"rank-{rank:05d}.jsonl"
        torn = mine.exists() and not mine.read_bytes().endswith(b"\n") and mine.stat().st_size > 0
        self._file = mine.open("a", buffering=1)  # line by line: what is known before a kill stays known
        if torn:
            self._file.write("\n")  # or the next line would continue the broken one

    def __len__(self) -> int:
        return len(self._scores)

    def find(self, request: Request) -> Score | None:
        return self._scores.get(_key(request))

    def add(self, request: Request, score: Score) -> None:
        key = _key(request)
        if key not in self._scores:
            self._scores[key] = score
            self._file.write(json.dumps({"key": key, **asdict(score)}) + "\n")

    def close(self) -> None:
        self._file.close()

    def _check_identity(self, text: str, rank: int) -> None:
        path = self.folder / "identity.json"
        if not path.exists():
            mine = self.folder / f"identity.json.{rank}"
            mine.write_text(text)
            mine.replace(path)
        elif path.read_text() != text:
            raise DataError(f"{path} is not what its folder's name says; remove {self.folder}")

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            self._scores[key] = Score(**entry)
        except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a kill; scored again
            return


def _key(request: Request) -> str:
    """Of the tokens, and of the noise that the group chooses."""
    parts = [list(request.context), list(request.continuation), request.group, request.check_greedy]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
