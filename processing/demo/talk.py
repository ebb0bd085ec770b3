"""Talk with a streaming model on the demo page: what it understands while one speaks, and its answer when one stops.

Needs no Gradio. Every visitor has a session of their own, whose turns form one conversation.
"""

import html
from collections.abc import Iterator

import soundfile

from modeling_blsp_kd import BlspKdForCausalLM
from processing.processing_blsp_kd import BlspKdProcessor
from processing.speech_session import SpeechSession

from .hearing import percent
from .listener import MAX_NEW_TOKENS, problem_of

TOP_K = 3
# Lines that the page shows, the newest first.
MAX_LINES = 8
SAY_SOMETHING = "Say something, and stop: the answer then comes by itself."


class Talk:
    """One visitor's conversation.

    Args:
        session ([`SpeechSession`]): with a rule for the end of speech.
    """

    def __init__(self, session: SpeechSession):
        self.session = session
        self.lines: list[str] = []
        self.num_ended = 0  # turns
        self.waits = False  # for the answer to a turn that is over
        self.is_answering = False


class Talker:
    """A streaming model that talks with the visitors of the page.

    Args:
        model ([`BlspKdForCausalLM`]), processor ([`BlspKdProcessor`]).
        max_new_tokens (`int`): longest answer.
    """

    def __init__(self, model: BlspKdForCausalLM, processor: BlspKdProcessor, max_new_tokens: int = MAX_NEW_TOKENS):
        self.model, self.processor, self.max_new_tokens = model.eval(), processor, max_new_tokens

    def push(self, path: str | None, instruction: str | None, talk: Talk | None) -> tuple[Talk | None, int, str, str]:
        """Read the next piece of what is said.

        Args:
            path: audio file of the piece.
            instruction: what to do with what is said; may be empty.
            talk: None, before the first piece.

        Returns:
            `tuple`: the talk, how many of its turns are over, and as HTML what was understood and the problem.
        """
        try:
            if path is not None:
                samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
                if talk is None:
                    session = self.processor.listen(self.model, sampling_rate=rate, end_of_speech=True)
                    talk = Talk(session)
                talk.session.instruction = (instruction or "").strip() or None
                self._note(talk, len(talk.session.push(samples.mean(axis=1)).speech_tokens))
                if talk.session.has_ended and not talk.waits:
                    talk.waits, talk.num_ended = True, talk.num_ended + 1
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            return None, 0, "", problem_of(error, path)
        return talk, 0 if talk is None else talk.num_ended, understood(talk), ""

    def answer(self, talk: Talk | None) -> Iterator[tuple[str, str]]:
        """Answer the turn, if there is one; yield the answer so far, and the problem as HTML."""
        text = ""
        if talk is None or talk.is_answering or talk.session.num_speech_tokens == 0:
            return
        talk.is_answering = True
        try:
            for piece in talk.session.answer(max_new_tokens=self.max_new_tokens):
                text += piece
                yield text, ""
        except ValueError as error:
            talk.session.reset()
            yield text, problem_of(error)
        finally:
            talk.lines.clear()
            talk.waits = talk.is_answering = False

    def _note(self, talk: Talk, num_new: int):
        if num_new:
            expected = talk.session.expected_next(TOP_K)
            words = ", ".join(f"<b>{html.escape(text.strip())}</b> {percent(share)}" for text, share in expected)
            talk.lines.insert(0, f"After {talk.session.num_speech_tokens} speech tokens the LLM expects: {words}")


def understood(talk: Talk | None) -> str:
    """Return what was understood of the turn so far, as HTML: what the LLM expects after each chunk of it."""
    lines = [] if talk is None else talk.lines[:MAX_LINES]
    return f'<div class="understood" aria-live="polite">{"<br>".join(lines or [SAY_SOMETHING])}</div>'
