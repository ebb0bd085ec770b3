"""Command lines: the options that several scripts share, and `--help` and recipes of options that are dataclasses."""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool

from ..backbone_names import ON_OTHER_REVISION

BACKBONES_HELP = (
    "JSON of where the backbones of a thin checkpoint are, for example "
    '\'{"audio_tower": "openai/whisper-small", "language_model": "/folder/of/llm"}\': one or both, Hub ids or folders. '
    "If omitted: where the checkpoint says."
)
ON_OTHER_REVISION_HELP = "What to do about a backbone of another revision than in training: warn (default), or error."


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


def add_backbone_options(parser: ArgumentParser):
    """Add the options of scripts that load a thin checkpoint; [`read_backbone_options`] reads them."""
    parser.add_argument("--backbones", help=BACKBONES_HELP)
    parser.add_argument("--on_other_revision", choices=ON_OTHER_REVISION, help=ON_OTHER_REVISION_HELP)


def read_backbone_options(options: Any) -> dict[str, Any]:
    """Return the options `--backbones` and `--on_other_revision` as arguments of `from_pretrained`, if they are given.

    Raises:
        ValueError: `--backbones` is no JSON.
    """
    given = {}
    if options.backbones is not None:
        try:
            given["backbones"] = json.loads(options.backbones)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'--backbones must be a JSON object such as \'{{"language_model": "/folder/of/llm"}}\', got '
                f"{options.backbones!r}: {error}."
            ) from error
    if options.on_other_revision is not None:
        given["on_other_revision"] = options.on_other_revision
    return given


def read_switch_option(given: Any, name: str) -> bool | dict[str, Any]:
    """Return what an option says that takes true, false (as transformers reads them), or options in JSON.

    Raises:
        ValueError: it is none of these.
    """
    with suppress(ArgumentTypeError):
        return string_to_bool(given)
    with suppress(json.JSONDecodeError):
        if isinstance(read := json.loads(given), dict):
            return read
    raise ValueError(f"--{name} must be true, false, or a JSON object of options, got {given!r}.")
