"""A folder that appears complete or not at all, and knows which files are its own.

`publication.json` holds the facts that the model card states, and every file with its checksum. A new publication may
replace files of an earlier one, but not files that somebody else added or changed. Leaves out: what is written.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "publication.json"


@contextmanager
def complete_or_nothing(folder: str | os.PathLike) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield an empty folder beside `folder` to write to, and put it in its place when the block ends without an error.

    Yields:
        the folder, and a dict for what `publication.json` is to tell beside the files.

    Raises:
        FileExistsError: `folder` holds files that no earlier publication wrote.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    record: dict[str, Any] = {}
    try:
        made.chmod(0o755)
        yield made, record
        (made / RECORD).write_text(json.dumps({**record, "files": _checksums(made)}, indent=2) + "\n")
        check_replaceable(folder)  # again: writing may have taken long
        earlier = made.with_name(f"{made.name}.earlier")
        if folder.exists():
            folder.rename(earlier)
        try:
            made.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check_replaceable(folder: Path):
    """Raise FileExistsError unless a folder is absent, empty, or an earlier publication as it was written."""
    if not folder.is_dir():
        if folder.exists():
            raise FileExistsError(f"{folder} is a file. Name a folder to publish to.")
        return
    found = _checksums(folder)
    record = folder / RECORD
    recorded = recorded_files(json.loads(record.read_text())) if record.exists() else {}
    foreign = sorted(name for name, checksum in found.items() if recorded.get(name) != checksum)
    if foreign:
        raise FileExistsError(
            f"{folder} holds {len(foreign)} file(s) that no earlier publication wrote, or that were changed since: "
            f"{foreign[:5]}. Publish to a new folder, or move these away."
        )


def recorded_files(record: dict) -> dict[str, str]:
    """Return the checksum of each file in a publication's record, by file name."""
    return record["files"]


def _checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the record, by path relative to the folder."""
    checksums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if name != RECORD:
            with open(os.fspath(path), "rb") as stream:
                checksums[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return checksums
