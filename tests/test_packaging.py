"""What `pip install` brings: every folder and file of the packages, so that a wheel does what a checkout does."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_blsp_kd", "processing")


def test_every_file_of_the_packages_is_in_the_wheel():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    brought = set()
    for package in setup["options"]["packages"].split():
        brought |= set(ROOT.joinpath(*package.split(".")).glob("*.py"))
    for package, patterns in setup["options.package_data"].items():
        for pattern in patterns.split():
            found = set(ROOT.joinpath(*package.split(".")).glob(pattern))
            assert found, f"{pattern} of {package} matches no file"
            brought |= found
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert {path for path in files if "__pycache__" not in path.parts} == brought


def test_no_file_edits_where_python_searches():
    """Scripts and tests found each other that way, and examples/evaluate.py hid the package `evaluate`."""
    edit = re.compile(r"\bsys\.path\b|syspath_prepend|addsitedir")
    files = [path for folder in (*PACKAGES, "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [path.name for path in files if edit.search(path.read_text()) and path != Path(__file__)] == []
