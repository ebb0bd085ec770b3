"""The demo page, and how a model understands a clip, as numbers and as a picture."""

from .hearing import Hearing, hear
from .picture import plot_hearing

__all__ = ["Hearing", "hear", "plot_hearing"]
