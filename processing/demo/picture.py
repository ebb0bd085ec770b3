"""Draw the result of `hear`: a spectrogram with the token boundaries, and the LLM's predictions after each token.

    plot_hearing(hear(model, processor, "clip.wav", transcript="the red cat ran to the sea"))

`hearing.py` measures what is drawn here.
"""

import io
import math
import textwrap
from typing import Any

import numpy as np
from transformers.utils import is_matplotlib_available

from .hearing import SPECTROGRAM_STEP_S, Hearing, percent

if is_matplotlib_available():
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    class NotebookFigure(Figure):
        """A figure that notebooks display without pyplot, which has global state and needs the main thread."""

        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()


# All in inches, except the font sizes (points).
FONT_SIZE, SMALL_FONT_SIZE = 9, 7.5
MIN_COLUMN_WIDTH, MAX_COLUMN_WIDTH = 0.7, 1.5
LEFT, RIGHT, TOP, BOTTOM = 0.52, 0.2, 0.1, 0.08
LINE_HEIGHT = 0.17
TIME_HEIGHT, SPECTROGRAM_HEIGHT, ALPHA_HEIGHT, FAN_HEIGHT, CELL_HEIGHT, KL_HEIGHT = 0.18, 0.95, 0.5, 0.25, 0.33, 0.55
NUMBER_HEIGHT, BAND_GAP, TICK_DISTANCE = 0.19, 0.3, 0.65
BLUE, ORANGE = "#0072B2", "#D55E00"  # distinguishable with colour blindness (Okabe and Ito)


def plot_hearing(hearing: Hearing, width: float = 10.0, max_tokens: int = 40) -> "Figure":
    """Plot the result of [`hear`], in bands that are read like lines of text.

    A band shows the log-mel spectrogram with the token boundaries and, on the same time axis, CIF's alphas. Below them
    it has one column per speech token, with the LLM's predictions after it and their KL to the text prompt.

    Args:
        hearing ([`Hearing`]): the result of [`hear`].
        width (`float`): of the figure, inches; 3.6 suits a phone. It decides the number of bands.
        max_tokens (`int`): how many tokens to show; the title says how many are left out.

    Returns:
        `matplotlib.figure.Figure`: notebooks display it if it ends a cell; `savefig` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not is_matplotlib_available():
        raise ImportError("The picture needs matplotlib. Install it with the extra 'demo': pip install -e '.[demo]'.")
    num_tokens = min(len(hearing.predictions), max_tokens)
    columns_that_fit = max(1, int((width - LEFT - RIGHT) / MIN_COLUMN_WIDTH))
    num_bands = math.ceil(num_tokens / columns_that_fit)
    num_columns = math.ceil(num_tokens / num_bands)  # bands of about the same length
    sheet = _Sheet(hearing, width, num_columns)

    title = sheet.wrap(hearing.summary() + _left_out(hearing, num_tokens), bold=True)
    key = sheet.wrap(_key(hearing))
    head_height = TOP + LINE_HEIGHT * (len(title) + len(key)) + 0.15
    height = head_height + num_bands * sheet.band_height + (num_bands - 1) * BAND_GAP + BOTTOM
    figure = NotebookFigure(figsize=(width, height), dpi=100, facecolor="white")
    text_top = 1 - TOP / height
    options: dict[str, Any] = {"fontsize": FONT_SIZE, "va": "top", "linespacing": LINE_HEIGHT * 72 / FONT_SIZE / 1.2}
    figure.text(0.08 / width, text_top, "\n".join(title), weight="bold", parse_math=False, **options)
    figure.text(0.08 / width, text_top - len(title) * LINE_HEIGHT / height, "\n".join(key), color="#444444", **options)
    top = height - head_height
    for first in range(0, num_tokens, num_columns):
        sheet.draw_band(figure, top, range(first, min(first + num_columns, num_tokens)))
        top -= sheet.band_height + BAND_GAP
    return figure


def _left_out(hearing: Hearing, num_shown: int) -> str:
    num_tokens = len(hearing.predictions)
    if num_shown == num_tokens:
        return ""
    until = "" if hearing.token_ends_s is None else f" (up to {hearing.token_ends_s[num_shown - 1]:.2f} s)"
    return f" Shown: the first {num_shown} tokens{until}; {num_tokens - num_shown} are left out."


def _key(hearing: Hearing) -> str:
    """Explain the parts of the plot."""
    key = "Each column: what the LLM expects next, after having heard that many tokens (␣ is a space)."
    if hearing.transcript_tokens is not None:
        key += " Outlined: what the transcript goes on with."
    if hearing.kl_to_text is not None:
        key += " KL: how far this is from what the LLM expects after the text, in nats; 0 is the same."
    if hearing.token_ends_s is None:
        key += " This adapter has a fixed rate: no alphas, no boundaries."
    return key


def _visible(text: str, max_chars: int) -> str:
    text = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


class _Sheet:
    """Draws the bands of one picture; positions are inches from the lower left corner of the figure."""

    def __init__(self, hearing: Hearing, width: float, num_columns: int):
        self.hearing = hearing
        # Empty where the model has none.
        self.alphas, self.token_ends_s, self.kl_to_text = (
            np.zeros(0) if values is None else values
            for values in (hearing.alphas, hearing.token_ends_s, hearing.kl_to_text)
        )
        self.width = width
        self.column_width = min((width - LEFT - RIGHT) / num_columns, MAX_COLUMN_WIDTH)
        self.max_chars = int(self.column_width * 72 / (0.68 * FONT_SIZE))
        num_rows = len(hearing.predictions[0])
        self.head_height = NUMBER_HEIGHT + (0.0 if hearing.transcript_tokens is None else LINE_HEIGHT)
        # The parts of a band, from top to bottom.
        parts = [(self._draw_spectrogram, SPECTROGRAM_HEIGHT)]
        if hearing.alphas is not None:
            parts += [(self._draw_alphas, ALPHA_HEIGHT), (self._draw_fan, FAN_HEIGHT)]
        parts += [(self._draw_table, self.head_height + num_rows * CELL_HEIGHT)]
        if hearing.kl_to_text is not None:
            parts += [(self._draw_kl, KL_HEIGHT)]
        self.parts = parts
        self.band_height = TIME_HEIGHT + sum(height for _, height in parts)

    def wrap(self, text: str, bold: bool = False) -> list[str]:
        character_width = (0.6 if bold else 0.53) * FONT_SIZE
        return textwrap.wrap(text, int((self.width - 0.16) * 72 / character_width))

    def draw_band(self, figure, top: float, tokens: range):
        """Draw the tokens of one band, and the stretch of audio that they come from."""
        figure_height = figure.get_figheight()
        top -= TIME_HEIGHT
        for draw, height in self.parts:
            top -= height
            size = self.column_width * len(tokens) / self.width, height / figure_height
            axes = figure.add_axes([LEFT / self.width, top / figure_height, *size], label=draw.__name__)
            axes.tick_params(labelsize=SMALL_FONT_SIZE, length=2, pad=2)
            draw(axes, tokens)

    def _stretch(self, tokens: range) -> tuple[float, float]:
        """Return start and end of the audio of these tokens, seconds."""
        hearing = self.hearing
        if hearing.token_ends_s is None:
            # Tokens of a fixed rate.
            per_token_s = hearing.duration_s / len(hearing.predictions)
            return tokens.start * per_token_s, tokens.stop * per_token_s
        start_s = 0.0 if tokens.start == 0 else hearing.token_ends_s[tokens.start - 1]
        is_last = tokens.stop == len(hearing.predictions)
        stop_s = hearing.duration_s if is_last else hearing.token_ends_s[tokens.stop - 1]
        return float(start_s), float(max(stop_s, start_s + hearing.frame_duration_s))

    def _draw_spectrogram(self, axes, tokens):
        hearing = self.hearing
        axes.imshow(
            hearing.spectrogram,
            cmap="cividis",
            origin="lower",
            aspect="auto",
            extent=(0, hearing.spectrogram.shape[1] * SPECTROGRAM_STEP_S, 0, len(hearing.spectrogram)),
        )
        axes.set_xlim(*self._stretch(tokens))
        axes.xaxis.tick_top()
        axes.xaxis.set_major_locator(MaxNLocator(max(2, int(self.column_width * len(tokens) / TICK_DISTANCE))))
        axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g} s")
        axes.set_yticks([])
        axes.set_ylabel("mel", fontsize=SMALL_FONT_SIZE)
        self._draw_boundaries(axes, tokens, "white")

    def _draw_alphas(self, axes, tokens):
        alphas = self.alphas
        middles_s = (np.arange(len(alphas)) + 0.5) * self.hearing.frame_duration_s
        axes.fill_between(middles_s, alphas, color=BLUE, alpha=0.25, linewidth=0)
        axes.plot(middles_s, alphas, color=BLUE, linewidth=1.2)
        axes.set(xlim=self._stretch(tokens), xticks=[], ylim=(0, 1.1 * max(0.5, float(alphas.max()))))
        axes.set_yticks([0, 0.5], ["0", "0.5"])
        axes.set_ylabel("alpha", fontsize=SMALL_FONT_SIZE)
        self._draw_boundaries(axes, tokens, "black")

    def _draw_boundaries(self, axes, tokens, color):
        for end_s in self.token_ends_s[tokens.start : tokens.stop]:
            axes.axvline(end_s, color=color, linewidth=1, linestyle=(0, (3, 2)))

    def _draw_fan(self, axes, tokens):
        """Draw lines from the boundaries on the time axis to those of the columns."""
        start_s, stop_s = self._stretch(tokens)
        for column, end_s in enumerate(self.token_ends_s[tokens.start : tokens.stop], start=1):
            place = (end_s - start_s) / (stop_s - start_s) * len(tokens)
            axes.plot([place, column], [1, 0], color="#888888", linewidth=0.8, clip_on=False)
        axes.set(xlim=(0, len(tokens)), ylim=(0, 1))
        axes.axis("off")

    def _draw_table(self, axes, tokens):
        hearing = self.hearing
        axes.set(xlim=(0, len(tokens)), ylim=(self.head_height + len(hearing.predictions[0]) * CELL_HEIGHT, 0))
        axes.axis("off")
        shades = colormaps["Blues"]
        for column, token in enumerate(tokens):
            known = hearing.transcript_tokens
            middle = column + 0.5
            heading = {"ha": "center", "va": "center", "parse_math": False}
            axes.text(middle, 0.1, f"after {token + 1}", fontsize=SMALL_FONT_SIZE, color="#444444", **heading)
            if known is not None:
                text = _visible(known[token], self.max_chars)
                axes.text(middle, 0.25, text, fontsize=FONT_SIZE, weight="bold", **heading)
            goes_on_with = None if known is None or token + 1 == len(known) else known[token + 1]
            for row, (text, probability) in enumerate(hearing.predictions[token]):
                cell_top = self.head_height + row * CELL_HEIGHT
                is_right = text == goes_on_with
                axes.add_patch(
                    Rectangle(
                        (column + 0.04, cell_top + 0.015),
                        0.92,
                        CELL_HEIGHT - 0.03,
                        facecolor=shades(0.8 * probability),
                        edgecolor=ORANGE if is_right else "#cccccc",
                        linewidth=2 if is_right else 0.6,
                        zorder=2 if is_right else 1,
                    )
                )
                colour = "white" if probability > 0.9 else "black"
                cell = {"color": colour, "zorder": 3, **heading}
                axes.text(middle, cell_top + 0.11, _visible(text, self.max_chars), fontsize=FONT_SIZE, **cell)
                axes.text(middle, cell_top + 0.24, percent(probability), fontsize=SMALL_FONT_SIZE, **cell)

    def _draw_kl(self, axes, tokens):
        kl_to_text = self.kl_to_text
        highest = max(0.1, float(kl_to_text.max()))
        axes.set(xlim=(0, len(tokens)), xticks=[], ylim=(0, 1.6 * highest))
        for column, token in enumerate(tokens):
            axes.bar(column + 0.5, kl_to_text[token], width=0.6, color=ORANGE)
            axes.text(
                column + 0.5,
                kl_to_text[token] + 0.06 * highest,
                f"{kl_to_text[token]:.2f}",
                ha="center",
                va="bottom",
                fontsize=SMALL_FONT_SIZE,
            )
        axes.set_yticks([0, highest], ["0", f"{highest:.1f}"])
        axes.set_ylabel("KL", fontsize=SMALL_FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
