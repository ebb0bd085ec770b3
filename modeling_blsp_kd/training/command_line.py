"""Command lines whose options are dataclasses, which `HfArgumentParser` reads: their `--help` and their recipes."""

import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from pathlib import Path

import yaml


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, so that its commands can be copied, and show defaults."""


def unfold_recipe(arguments: list[str]) -> list[str]:
    """Return a command line in which a recipe, if it is the first argument, is replaced by its options."""
    if not arguments or not arguments[0].endswith((".yaml", ".yml")):
        return arguments
    recipe = yaml.safe_load(Path(arguments[0]).read_text())
    recipe.pop("estimate", None)  # what `estimate.py` assumes about machines and data

    def words(value) -> list[str]:
        if isinstance(value, list):
            return [word for item in value for word in words(item)]
        return [value if isinstance(value, str) else json.dumps(value)]

    return [*(part for name, value in recipe.items() for part in (f"--{name}", *words(value))), *arguments[1:]]
