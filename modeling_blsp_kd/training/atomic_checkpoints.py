"""Checkpoints that are complete or absent: written into a temporary folder with checksums of all files, then renamed.

Follows the usual order of durable writing: write, fsync, rename, fsync the folder. `saving.py` makes the
Trainer write them like this. Leaves out: what a checkpoint holds, and folders that processes of one node do not share.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

SEAL = "checkpoint_files.json"
# The Trainer does not regard a folder of this name as a checkpoint, and does not push it to the Hub.
ASIDE = "_unfinished"


def move_into_place(written: Path, final: Path):
    """Write the checksums of its files into the folder `written`, then rename it to `final`, which may exist."""
    contents = {}
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        _sync(path)  # a full disk may be noticed only here
        contents[path.relative_to(written).as_posix()] = _describe(path)
    (written / SEAL).write_text(json.dumps({"files": contents}, indent=1) + "\n")
    for path in (written / SEAL, *(path for path in written.rglob("*") if path.is_dir()), written):
        _sync(path)
    if final.exists():
        # A broken one, or one of an earlier run: `rename` replaces no folder that has files.
        final.rename(written.with_name("replaced"))
    written.rename(final)
    _sync(final.parent)


def defect(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None. Without checksums it passes if the Trainer had finished it."""
    if not checkpoint.is_dir():
        return "it is no folder"
    if not (checkpoint / SEAL).exists():
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # what a Trainer writes last
        except (OSError, ValueError) as error:
            return f"trainer_state.json cannot be read: {error}"
        logger.warning(f"{checkpoint} has no {SEAL} (another Trainer wrote it), so it cannot be verified.")
        return None
    try:
        expected = json.loads((checkpoint / SEAL).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be read: {error!r}"
    for name, written in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {written['bytes']}"
        if _describe(path) != written:
            return f"{name} was altered: its SHA-256 is not the one in {SEAL}"
    return None


def choose_checkpoint(resume_from: str | bool, output_dir: str) -> str:
    """Return the checkpoint to resume from.

    Args:
        resume_from: a checkpoint, or True for the last good one in `output_dir`, with a warning if others are broken.

    Raises:
        ValueError: the named checkpoint is broken, or there is no good one.
    """
    if not isinstance(resume_from, bool):
        if problem := defect(Path(resume_from)):
            raise ValueError(
                f"Cannot resume from {resume_from}: {problem}. Name another checkpoint, or pass "
                "resume_from_checkpoint=True for the last good one."
            )
        return resume_from
    broken: list[str] = []
    for checkpoint in sorted(checkpoints_in(output_dir), key=_step_of, reverse=True):
        problem = defect(checkpoint)
        if problem is None:
            if broken:
                logger.warning(
                    f"Resuming from {checkpoint} instead, because later ones are broken: {'; '.join(broken)}."
                )
            return str(checkpoint)
        broken.append(f"{checkpoint}: {problem}")
    found = f"all are broken: {'; '.join(broken)}" if broken else "there is none"
    raise ValueError(f"No checkpoint to resume from in {output_dir}: {found}. Without resuming, training starts anew.")


def remove_old(output_dir: Path, aside: Path, limit: int | None, keep: set[str]):
    """Remove the oldest checkpoints until `limit` are left (None or 0: all stay), but none of `keep`."""
    checkpoints = sorted(checkpoints_in(output_dir), key=lambda path: (path.stat().st_mtime_ns, _step_of(path)))
    surplus = len(checkpoints) - limit if limit else 0
    doomed = [checkpoint for checkpoint in checkpoints if str(checkpoint) not in keep][: max(surplus, 0)]
    for checkpoint in doomed:
        # Renamed first, so that a half-removed one is never mistaken for a checkpoint.
        checkpoint.rename(aside / f"removed-{checkpoint.name}")
    shutil.rmtree(aside)


def checkpoints_in(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _describe(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
