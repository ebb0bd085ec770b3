"""What a published folder may not hold, its files by checksum, and a Python that sees nothing of this project."""

import hashlib
import re
from pathlib import Path

import modeling_blsp_kd
import processing
from processing.publishing.verify import run_script

ROOT = Path(__file__).parents[2]
PACKAGE_FOLDERS = [Path(package.__file__).parent for package in (modeling_blsp_kd, processing)]

# What a file that travels alone must not say; transformers finds imports by regular expression, in docstrings too.
UNSHIPPABLE = {
    "imports the package by name": re.compile(r"^\s*(?:import|from)\s+(?:modeling_blsp_kd|processing)\b", re.M),
    "imports from above": re.compile(r"^\s*from\s+\.\.", re.M),
    "imports a module, not a thing in it": re.compile(r"^\s*from\s+\.\s+import\b", re.M),
    "imports from a folder": re.compile(r"^\s*from\s+\.\w+\.\w+", re.M),
    "imports late": re.compile(r"^[ \t]+from\s+\.\w*\s+import\b", re.M),
}


def unshippable(text) -> list[str]:
    return [problem for problem, pattern in UNSHIPPABLE.items() if pattern.search(text)]


def contents(folder) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run_python(code, *arguments, folder, **options):
    """Run code in a fresh interpreter that sees none of this one's settings."""
    script = folder / "child.py"
    script.write_text(code)
    return run_script(script, *arguments, folder=folder, timeout_s=120, **options)


def assert_tells_no_path(folder, *paths):
    for file in (path for path in folder.rglob("*") if path.is_file()):
        contents = file.read_bytes()
        for path in (*paths, ROOT):
            assert str(path).encode() not in contents, f"{file.name} holds {path}"
