"""A session: the model reads speech while one speaks, and answers when one stops.

Puts together what does it: features (`streaming_features.py`), speech tokens (the model's `stream_speech`), the LLM's
key-value cache (its `cache_prompt`), chats, and a rule for the end of a turn (`end_of_speech.py`). Leaves out: when to
answer, which the caller decides.
"""

import threading
from typing import Any

import torch

from .end_of_speech import EndOfSpeech, SilenceWatch
from .spoken_inputs import check_text, user_turn
from .streaming_features import FeatureStream
from .text_streams import TextStream

MAX_NEW_TOKENS = 256


class SpeechSession:
    """A conversation in which the user speaks. [`~BlspKdProcessor.listen`] makes it.

    ```python
    session = processor.listen(model, instruction="Name the animal.", sampling_rate=48_000)
    for samples in microphone:  # pieces of any size
        session.push(samples)
    for piece in session.answer(max_new_tokens=32):
        print(piece, end="")
    ```

    Whatever has been said completely is in the LLM's cache when `answer` is called, so that the time until its first
    token does not depend on how long one spoke. The next `push` begins the next turn of the same conversation.

    Methods may be called from several threads, one at a time; in an event loop by `asyncio.to_thread`. An answer is
    generated in a thread of its own.

    Attributes:
        instruction (`str`, *optional*): text before the speech of a turn. It may be changed at any time.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        instruction: str | None = None,
        messages: list[dict] | tuple[dict, ...] = (),
        sampling_rate: int | None = None,
        chunk_ms: int | None = None,
        chat_template_kwargs: dict | None = None,
        end_of_speech: bool | dict = False,
    ):
        self.model, self.processor, self.instruction = model, processor, instruction
        self._chunk_ms, self._sampling_rate = chunk_ms, sampling_rate
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._first_messages = list(messages)
        self._rule = EndOfSpeech.read(end_of_speech)
        self._lock = threading.RLock()
        self._answer: TextStream | None = None
        self._is_answering = False
        self._begin()

    def _begin(self):
        self._messages = list(self._first_messages)
        self._rendered: tuple[Any, list[list[int]]] = (None, [])
        self._features = FeatureStream(self.processor.feature_extractor, self._sampling_rate)
        self._begin_turn()
        self._prompt = self.model.cache_prompt()
        # The numbers that stand for the speech tokens of each turn; the last is that of the current turn.
        self._turns: list[list[int]] = [[]]
        self._prompt.read(self._text_around_speech()[0])

    def _begin_turn(self):
        self._stream = self.model.stream_speech(self._chunk_ms)
        rule, rate = self._rule, self._features.rate
        self._watch = None if rule is None else SilenceWatch(rule, rate, self.model.frame_duration_s)

    def push(self, samples: Any) -> Any:
        """Read the next samples.

        While an answer runs, they only wait: they begin the next turn.

        Args:
            samples (`np.ndarray` of shape (num_samples,)): one channel; floats within [-1, 1], or int16.

        Returns:
            [`StreamedSpeech`]: the speech tokens that these samples completed, where, and the weights of the frames
            that they completed.

        Raises:
            TypeError, ValueError: see [`FeatureStream.add`]; or the conversation does not fit the LLM's context.
                Samples that were read stay.
        """
        with self._lock:
            added = self._features.add(samples)
            if self._is_answering:
                return self._stream.nothing
            self._hear(added)
            return self._listen()

    def answer(self, **generate_kwargs: Any) -> TextStream:
        """End the turn, and answer it.

        Args:
            generate_kwargs: of the model's `generate`; `max_new_tokens` defaults to 256.

        Returns:
            [`TextStream`]: an iterator over the pieces of the answer, which is generated whether it is read or not.

        Raises:
            ValueError: an answer is running, nothing was said, or an option is not for a session. An error while the
                answer is generated is raised by the iterator. The turn then goes on as if it had not been ended.
        """
        with self._lock:
            if self._is_answering:
                raise ValueError("An answer is running. Read it to its end, or interrupt() it.")
            if "streamer" in generate_kwargs:
                raise ValueError("answer() streams by itself: iterate over what it returns.")
            self._prompt.check_options(generate_kwargs)
            if not {"max_new_tokens", "max_length", "generation_config"} & set(generate_kwargs):
                generate_kwargs["max_new_tokens"] = MAX_NEW_TOKENS
            self._features.end_samples()
            self._listen(prefill=False)
            num_samples, num_kept = self._features.num_samples, len(self._prompt.speech_tokens)
            speech = self._stream.finish(torch.from_numpy(self._features.rest()))
            said = [*self._turns[-1], *self._prompt.add_speech(speech.speech_tokens)]
            prompt = self._expand([*self._turns[:-1], said])
            criteria = generate_kwargs.pop("stopping_criteria", None)
            turn, self._is_answering = user_turn(self.instruction), True

        def generate(**options):
            try:
                token_ids = self._prompt.generate(prompt, **generate_kwargs, **options)
            except BaseException:
                with self._lock:
                    self._prompt.drop_speech(num_kept)
                    self._hear(self._features.after(num_samples))
                    self._is_answering = False
                raise
            with self._lock:
                text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
                self._messages += [*turn, {"role": "assistant", "content": text}]
                self._turns[-1:] = [said, []]
                self._features.end_clip(num_samples)
                self._begin_turn()
                self._hear(self._features.after(0))
                self._is_answering = False

        self._answer = TextStream(generate, self.processor.tokenizer, criteria)
        return self._answer

    def interrupt(self):
        """Stop the answer that is running, if there is one, after its current token. What was said of it stays."""
        if self._answer is not None:
            self._answer.stop()

    def reset(self):
        """Interrupt, and begin the conversation anew."""
        self.interrupt()
        with self._lock:
            self._begin()

    @property
    def messages(self) -> list[dict]:
        """Return the turns that are over as chat messages; audio blocks hold no clip."""
        return list(self._messages)

    @property
    def num_speech_tokens(self) -> int:
        """Return how many speech tokens the current turn has so far."""
        return len(self._turns[-1])

    @property
    def has_ended(self) -> bool:
        """Return whether one has stopped speaking, by the rule that was given as `end_of_speech`.

        Raises:
            ValueError: there is no rule.
        """
        if self._watch is None:
            raise ValueError("There is no rule for the end of speech. Give one: listen(..., end_of_speech=True).")
        return self.num_speech_tokens > 0 and not self._is_answering and self._watch.is_over

    @property
    def num_cached(self) -> int:
        """Return how many positions of the conversation the LLM has read."""
        return len(self._prompt.cached)

    def expected_next(self, top_k: int = 5) -> list[tuple[str, float]]:
        """Return what the LLM expects after what it has read of this turn: tokens and their probabilities.

        It has been trained to expect after speech what it expects after the text, so this shows what it understood.
        Empty between an answer and the next turn.
        """
        with self._lock:
            if self._prompt.logits is None:
                return []
            best = self._prompt.logits.softmax(-1).topk(top_k)
        decode = self.processor.tokenizer.decode
        return [(decode([token]), share) for token, share in zip(best.indices.tolist(), best.values.tolist())]

    def _hear(self, samples):
        if self._watch is not None:
            self._watch.hear(samples)

    def _listen(self, prefill: bool = True) -> Any:
        """Encode the blocks that are complete, and have the LLM read their speech tokens (if `prefill`)."""
        heard = self._stream.nothing
        while self._features.num_ready >= (count := self._stream.num_wanted):
            speech = self._stream.push(torch.from_numpy(self._features.frames(count)))
            self._features.take(count)
            self._turns[-1] += self._prompt.add_speech(speech.speech_tokens)
            if self._watch is not None:
                self._watch.weigh(speech.alphas.tolist())
            heard += speech
        if prefill and len(heard.speech_tokens):
            self._prompt.read(self._expand(self._turns, is_over=False))
        return heard

    def _expand(self, turns: list[list[int]], is_over: bool = True) -> list[int]:
        """Return the conversation as a prompt, with what follows the speech of its last turn only if that is over."""
        pieces = self._text_around_speech()
        prompt = list(pieces[0])
        for said, text in zip(turns, pieces[1:]):
            prompt += [*said, *text]
        return prompt if is_over else prompt[: len(prompt) - len(pieces[-1])]

    def _text_around_speech(self) -> list[list[int]]:
        """Return the token ids before, between and after the speech of all turns."""
        key = (len(self._messages), self.instruction)
        if key != self._rendered[0]:
            processor = self.processor
            if self.instruction is not None:
                check_text(self.instruction, "instruction", processor.audio_token)
            chat = [*self._messages, *user_turn(self.instruction)]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, **self._chat_template_kwargs)
            pieces: list[list[int]] = [[]]
            for token_id in processor.tokenize(text, add_special_tokens=False)["input_ids"]:
                if token_id == processor.audio_token_id:
                    pieces.append([])
                else:
                    pieces[-1].append(token_id)
            if len(pieces) != len(self._turns) + 1:
                raise ValueError(
                    f"The messages before the first turn hold {len(pieces) - 2} audio(s). Give text only: speech comes "
                    "by push()."
                )
            self._rendered = (key, pieces)
        return self._rendered[1]
