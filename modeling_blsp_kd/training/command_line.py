"""The `--help` of scripts whose options are dataclasses, which `HfArgumentParser` reads."""

from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, so that its commands can be copied, and show defaults."""
