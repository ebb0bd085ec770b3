"""Templates of prompts about transcripts: named instructions that stand before the content.

Follows arXiv 2405.19041: the instruction is text for teacher and student alike. Leaves out: prompts with words after
the content, which the collator does not make.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from string import Template

from processing.manifests import BadRow

BUILT_IN = {
    "continue": "Continue the following text.",
    "answer": "Answer the following request.",
    "repeat": "Repeat the words.",
    "own": "$instruction",
}


@dataclass(frozen=True)
class Instruction:
    """An instruction, in which `$name` stands for a column of the row (`string.Template`: no code in it ever runs)."""

    name: str
    text: str

    def fill(self, row: dict) -> str:
        """Return the instruction for one row.

        Raises:
            BadRow: the row has no value in a column that the instruction names. An empty value is none, except for
                `own`: with an empty instruction the speech itself is the request.
        """
        values = {}
        for column in Template(self.text).get_identifiers():
            values[column] = row.get(column)
            is_given = isinstance(values[column], (str, int, float))
            if not is_given or not (str(values[column]).strip() or self.text == BUILT_IN["own"]):
                raise BadRow(f"template {self.name!r} needs a value in column {column!r}, got {values[column]!r}")
        return Template(self.text).substitute(values).strip()


def read_templates(names: list[str] | None, instructions: list[str]) -> list[Instruction]:
    """Read templates from names, files and texts.

    Args:
        names: built-in names; `.json` files, an object of name to instruction or a list of instructions; `.txt` files,
            one instruction per line. None: "continue" if there are no instructions either.
        instructions: instructions as texts.

    Raises:
        ValueError: a template is unknown, unreadable or empty, or two have the same name.
    """
    if names is None:
        names = [] if instructions else ["continue"]
    found = []
    for name in names:
        path = Path(name)
        if path.suffix == ".json":
            found += _of_json(path)
        elif path.suffix == ".txt":
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            found += _numbered(path.stem, [line for line in lines if line])
        elif name in BUILT_IN:
            found.append(Instruction(name, BUILT_IN[name]))
        else:
            raise ValueError(f"Unknown template {name!r}: expected one of {[*BUILT_IN]}, or a .json or .txt file.")
    found += _numbered("instruction", instructions)
    if not found:
        raise ValueError("No templates: name some with --templates, or write some with --instructions.")
    for template in found:
        # train.py gives rows without an instruction a default one, so training would use another prompt.
        if not isinstance(template.text, str) or not template.text.strip():
            raise ValueError(f"Template {template.name!r} must be a text that is not empty, got {template.text!r}.")
        if not Template(template.text).is_valid():
            raise ValueError(
                f"Template {template.name!r} is not valid: {template.text!r}. Write $column for a column, $$ for $."
            )
    twice = sorted({one.name for one in found if sum(one.name == other.name for other in found) > 1})
    if twice:
        raise ValueError(f"Templates need different names, but these come twice: {twice}.")
    return found


def _of_json(path: Path) -> list[Instruction]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if isinstance(content, dict):
        return [Instruction(name, text) for name, text in content.items()]
    if isinstance(content, list):
        return _numbered(path.stem, content)
    raise ValueError(f"{path}: expected an object of name to instruction or a list of instructions, got {content!r}.")


def _numbered(name: str, texts: list[str]) -> list[Instruction]:
    return [Instruction(f"{name}{number}", text) for number, text in enumerate(texts, start=1)]


def choose(templates: list[Instruction], how_many: int | None, seed: int, index: int) -> list[Instruction]:
    """Draw `how_many` templates for row `index` (all if None), the same ones at each call, in their given order."""
    if how_many is None or how_many >= len(templates):
        return templates
    chosen = random.Random(f"{seed}/{index}").sample(range(len(templates)), how_many)
    return [templates[position] for position in sorted(chosen)]
