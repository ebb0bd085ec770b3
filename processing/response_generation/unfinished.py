"""Keep the answers of a run that may be killed at any point, and join them into the output at the end.

Every process appends whole blocks of rows, one line each, to a file of its own, and each line is on the disk before the
next block begins. A continued run makes the blocks that no file holds. Leaves out: machines that share no folder.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout


class Unfinished:
    """The files of an output that is being made.

    For `train.jsonl` they are `train.parts/` (until it is complete), `train.settings.json`, `train.rejects.jsonl` and
    `train.audio/`.

    Args:
        output: the manifest to make.
        settings: all that the rows depend on, as JSON values.
    """

    def __init__(self, output: Path, settings: dict):
        self.output, self.settings = output, settings
        self.parts, self.settings_file, self.rejects, self.audio = (
            output.with_name(output.stem + ending)
            for ending in (".parts", ".settings.json", ".rejects.jsonl", ".audio")
        )
        self.locks = ExitStack()

    def prepare(self):
        """Make the folder, or repair what a killed run left in it. One process calls this before the others begin.

        Raises:
            ValueError: the files were made with other settings, or by something else.
            RuntimeError: another run is writing them, or a line that was on the disk has changed.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.settings_file.exists():
            self._compare_settings()
        elif self.output.exists() or self.parts.exists():
            raise ValueError(
                f"{self.output} or {self.parts} exists, but not {self.settings_file}, which tells how it was made. "
                "Choose another --output, or delete what is there."
            )
        else:
            write_atomically(self.settings_file, [json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"])
        self.parts.mkdir(exist_ok=True)
        for part in self._parts():
            with self._locked(part):
                self._cut_half_written_line(part)
        if self.is_complete():
            # An earlier run was killed after the last file was in place.
            shutil.rmtree(self.parts)

    def is_complete(self) -> bool:
        return self.output.exists()

    def done(self) -> dict[int, tuple[Path, int]]:
        """Return the number of each finished block, with the file and the offset of its line."""
        places = {}
        for part in self._parts():
            with part.open("rb") as file:
                offset = 0
                for line in file:
                    places[json.loads(line)["block"]] = (part, offset)
                    offset += len(line)
        return places

    def open_part(self, process_index: int):
        """Open the file of one process, and hold its lock until [`~Unfinished.close`]."""
        part = self.parts / f"part-{process_index:05d}.jsonl"
        self.locks.enter_context(self._locked(part))
        self.file = self.locks.enter_context(part.open("ab"))
        sync_folder(self.parts)

    def append(self, block: int, rows: list[dict], rejects: list[dict]):
        """Write one finished block to the disk."""
        line = json.dumps({"block": block, "rows": rows, "rejects": rejects}, ensure_ascii=False)
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        """Close the file of this process, and release its lock."""
        self.locks.close()

    def keep_audio(self, index: int, audio: bytes, kind: str) -> Path:
        """Write the embedded audio of row `index` to a file beside the manifest, and return its path."""
        path = self.audio / f"{index // 1000:06d}" / f"{index:09d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [audio])
        return path

    def finish(self, num_blocks: int) -> tuple[int, int]:
        """Join all blocks, in the order of the rows, and return the number of rows and of rejects.

        Raises:
            RuntimeError: a block is missing.
        """
        places = self.done()
        missing = sorted(set(range(num_blocks)) - set(places))
        if missing or len(places) > num_blocks:
            raise RuntimeError(
                f"{self.parts} holds {len(places)} of {num_blocks} blocks, without {missing[:5]}: has the data "
                "changed, or was a file removed? Run again, or delete the folder and begin anew."
            )
        counts = {"rows": 0, "rejects": 0}

        def lines(name):
            for number in range(num_blocks):
                part, offset = places[number]
                with part.open("rb") as file:
                    file.seek(offset)
                    for row in json.loads(file.readline())[name]:
                        counts[name] += 1
                        yield json.dumps(row, ensure_ascii=False) + "\n"

        write_atomically(self.rejects, lines("rejects"))
        # This comes last, because a run is complete when this file exists.
        write_atomically(self.output, lines("rows"))
        shutil.rmtree(self.parts)
        return counts["rows"], counts["rejects"]

    def _parts(self) -> list[Path]:
        return sorted(self.parts.glob("part-*.jsonl"))

    def _locked(self, part: Path):
        try:
            return FileLock(f"{part}.lock", blocking=False).acquire()
        except Timeout:
            raise RuntimeError(f"{part} is being written by another run. Wait for it, or end it.") from None

    def _compare_settings(self):
        before, now = json.loads(self.settings_file.read_text(encoding="utf-8")), self.settings
        different = [
            f"{name}: {before.get(name)!r}, now {now.get(name)!r}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.output} was begun with other settings ({'; '.join(different)}). Go on with those, choose "
                f"another --output, or delete {self.settings_file} and all files beside it that begin with "
                f"'{self.output.stem}.'."
            )

    def _cut_half_written_line(self, part: Path):
        """Remove the last line if its end is missing, because a process was killed while it wrote."""
        with part.open("rb+") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                is_last = file.peek(1) == b""
                if not line.endswith(b"\n") or not _is_json(line):
                    if not is_last:
                        raise RuntimeError(f"{part}, line {number} is damaged. Remove that line and run again.")
                    break
                end += len(line)
            file.truncate(end)
            os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def write_atomically(path: Path, pieces: Iterable[str | bytes]):
    """Write pieces of text or bytes so that, even after a power cut, `path` is either complete or what it was."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece.encode() if isinstance(piece, str) else piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path):
    """Write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
