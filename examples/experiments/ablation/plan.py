"""The settings that all runs share, and the fingerprint of all settings that a result depends on.

Results are named by configuration, seed and fingerprint, so that those of several machines lie together in one folder,
none overwrites another, and nothing is run twice. Leaves out: the code, whose changes a fingerprint does not see.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from processing.manifests import read_objects

from .matrix import Configuration


@dataclass(frozen=True)
class Plan:
    """The settings that all runs share.

    Args:
        steps: of the optimiser.
        num_utterances: training clips of the tiny world.
        rows_manifest: the rows that everything is evaluated on.
        output_dir: for the folder of each run.
        results_dir: for the result of each run.
        cache_dir: the tiny world's clips.
        train_options: further options of `train.py`, the same for all.
        threads: of one run.
        baseline: each configuration trains as long as this one takes for `steps`; omitted, each takes `steps`.
    """

    steps: int
    num_utterances: int
    rows_manifest: Path
    output_dir: Path
    results_dir: Path
    cache_dir: Path
    train_options: list[str] = field(default_factory=list)
    threads: int = 1
    baseline: Configuration | None = None

    def settings(self, configuration: Configuration) -> dict:
        """Return all that a result depends on except the seed."""
        return {
            "name": configuration.name,
            "script": configuration.script,
            "options": configuration.options,
            "systems": list(configuration.systems),
            "steps": self.steps,
            "num_utterances": self.num_utterances,
            "train_options": [_portable(option) for option in self.train_options],
            "rows": _fingerprint_of_rows(self.rows_manifest),
            **({} if self.baseline is None else {"time_of": self.baseline.name}),
        }

    def fingerprint(self, configuration: Configuration) -> str:
        settings = json.dumps(self.settings(configuration), sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:12]

    def result_path(self, configuration: Configuration, seed: int) -> Path:
        return self.results_dir / f"{configuration.name}-seed{seed}-{self.fingerprint(configuration)}.json"

    def load(self, configuration: Configuration, seed: int) -> dict | None:
        """Return the result of a run with these settings, or None."""
        path = self.result_path(configuration, seed)
        return json.loads(path.read_text()) if path.exists() else None


def _portable(option: str) -> str:
    """Name a file by its name and contents and a folder by its name, because other machines keep them elsewhere."""
    path = Path(option)
    if path.is_file():
        return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return path.name if path.is_dir() else option


def read_rows(manifest: Path) -> list[dict]:
    """Read rows to evaluate on, each with an `id`: its own, or its number as in `evaluate.py`.

    Raises:
        ValueError: a row has no answer to compare with.
    """
    rows = [
        {**row, "id": str(row.get("id", number))} for number, (_, row) in enumerate(read_objects(manifest), start=1)
    ]
    unanswered = [row["id"] for row in rows if not row.get("answer")]
    if unanswered or not rows:
        raise ValueError(
            f"{manifest} has {len(rows)} rows, of which {len(unanswered)} have no 'answer' (the first: "
            f"{unanswered[:1]}). Configurations are compared by answers: give each row its gold one."
        )
    return rows


def _fingerprint_of_rows(manifest: Path) -> str:
    rows = read_rows(manifest)
    rows_without_audio = [{name: value for name, value in row.items() if name != "audio"} for row in rows]
    return (
        f"{len(rows)} sha256:{hashlib.sha256(json.dumps(rows_without_audio, sort_keys=True).encode()).hexdigest()[:16]}"
    )
