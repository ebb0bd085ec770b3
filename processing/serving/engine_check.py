"""Check at the start that engine and model fit: the same tokens at the same positions, the same LLM, partial LoRA.

It asks the engine for one token after small prompts whose vectors are rows of the LLM's embeddings, so that they must
be read like the text. Leaves out: waiting for the engine, and asking it for clients (`engine.py`).
"""

from typing import Any, NamedTuple

import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor

from .engine import Engine
from .speech_parts import prompt_embeds

INSTRUCTION, WORDS = "Repeat the words.", "what was said"
# Equal prompts may be computed in batches of other sizes, of numbers with eight bits.
TOLERANCE = 0.05
HOW_TO_START = "docs/serving_engine.md shows how to start the engine."


class EngineFacts(NamedTuple):
    """Holds what is known of an engine that fits: names of its LLM and of its partial LoRA, and its longest prompt."""

    base: str
    adapter: str | None = None
    max_model_len: int | None = None


class MisfitError(ValueError):
    """Engine and model do not fit together."""


class _Answer(NamedTuple):
    prompt_ids: list[int]
    logprobs: dict[str, float]


async def check_engine(
    engine: Engine,
    model: BlspKdForCausalLM,
    processor: BlspKdProcessor,
    has_plora: bool,
    base: str | None = None,
    adapter: str | None = None,
) -> EngineFacts:
    """Check an engine.

    Args:
        model ([`BlspKdForCausalLM`]), has_plora (`bool`): of [`load_without_llm`].
        base, adapter (`str`, *optional*): names of the engine's LLM and partial LoRA; omitted, the only ones it has.

    Raises:
        MisfitError: it would answer otherwise than the model, or not at all; the message says what to do.
        EngineUnreachable, TimedOut: it does not answer.
    """
    facts = await _names(engine, has_plora, base, adapter)
    probe = _Probe(engine, model, processor)
    await probe.check_positions(facts.base)
    text, spoken = await probe.text(facts.base), await probe.spoken(facts.base)
    if probe.rows is not None and not _are_close(text, spoken):
        raise MisfitError(
            "The engine's LLM does not read vectors as it reads the text that they stand for: the log-probabilities "
            f"after the text are {text.logprobs}, after its embeddings {spoken.logprobs}. Is it the LLM of this model?"
        )
    if facts.adapter is not None and not _are_close(text, await probe.text(facts.adapter)):
        raise MisfitError(
            f"The engine applies {facts.adapter!r} to text, too, but partial LoRA is for speech alone. Install this "
            "package in the engine's environment, whose plugin does it, and start the engine with the files that "
            f"`python -m processing.serving.engine_files` writes. {HOW_TO_START}"
        )
    return facts


async def _names(engine: Engine, has_plora: bool, base: str | None, adapter: str | None) -> EngineFacts:
    cards = await engine.models()
    bases = [card for card in cards if card.get("parent") is None]
    adapters = [card for card in cards if card.get("parent") is not None]
    chosen = _choose("LLM", "--engine_model", bases, base)
    if not has_plora:
        return EngineFacts(chosen["id"], None, chosen.get("max_model_len"))
    if not adapters and adapter is None:
        raise MisfitError(
            "This model has partial LoRA, but the engine offers no LoRA. Write it with `python -m "
            f"processing.serving.engine_files`, and give it to the engine. {HOW_TO_START}"
        )
    return EngineFacts(
        chosen["id"], _choose("LoRA", "--engine_adapter", adapters, adapter)["id"], chosen.get("max_model_len")
    )


def _choose(kind: str, option: str, cards: list[dict], name: str | None) -> dict:
    names = [card["id"] for card in cards]
    if name is None and len(names) == 1:
        return cards[0]
    if name not in names:
        raise MisfitError(f"The engine's {kind} must be chosen with {option}, among {names}, got {name!r}.")
    return cards[names.index(name)]


def _are_close(first: _Answer, second: _Answer) -> bool:
    """Return whether the likeliest tokens after two prompts are as likely after the other."""
    likeliest = sorted(first.logprobs, key=lambda token: -first.logprobs[token])[:2]
    return all(abs(first.logprobs[token] - second.logprobs.get(token, -torch.inf)) <= TOLERANCE for token in likeliest)


class _Probe:
    """Prompts that are asked of an engine."""

    def __init__(self, engine: Engine, model: BlspKdForCausalLM, processor: BlspKdProcessor):
        self.engine, self.processor = engine, processor
        self.embeddings, self.vocab_size = model.get_input_embeddings(), model.config.get_text_config().vocab_size
        self.chat = self._turn({"type": "audio"}), self._turn({"type": "text", "text": WORDS})
        self.rows = self._rows_in_place()

    def _turn(self, content: dict) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, content]}]

    def _ids(self, chat: list[dict]) -> list[int]:
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return self.processor.tokenize(prompt, add_special_tokens=False)["input_ids"]

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.embeddings(torch.tensor(ids, device=self.embeddings.weight.device))

    def _rows_in_place(self) -> torch.Tensor | None:
        """Return the embeddings of the tokens that stand where the audio would; None if others differ, too."""
        with_audio, with_text = map(self._ids, self.chat)
        start = with_audio.index(self.processor.audio_token_id)
        stop = len(with_text) - (len(with_audio) - start - 1)
        is_same = with_text[:start] == with_audio[:start] and with_text[stop:] == with_audio[start + 1 :]
        return self._embed(with_text[start:stop]) if is_same and start < stop else None

    async def text(self, name: str) -> _Answer:
        return await self._ask(name, self.chat[1])

    async def spoken(self, name: str) -> _Answer:
        part = prompt_embeds(self._embed([0]) if self.rows is None else self.rows)
        return await self._ask(name, self._turn(part))

    async def check_positions(self, name: str):
        """Compare the token ids of a prompt of two turns and two clips with the processor's.

        Raises:
            MisfitError: they differ.
        """
        counts = (3, 2)
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, {"type": "audio"}]},
            {"role": "assistant", "content": WORDS},
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": INSTRUCTION}]},
        ]
        parts = iter([prompt_embeds(self._embed([0] * count)) for count in counts])
        sent = [
            {**turn, "content": [next(parts) if block["type"] == "audio" else block for block in turn["content"]]}
            if isinstance(turn["content"], list)
            else turn
            for turn in turns
        ]
        audio, remaining, expected = self.processor.audio_token_id, iter(counts), list[int]()
        for token_id in self._ids(turns):
            expected += [audio] * next(remaining) if token_id == audio else [token_id]
        got = (await self._ask(name, sent)).prompt_ids
        pairs = list(zip(expected, got))
        place = next((place for place, (own, other) in enumerate(pairs) if own not in (audio, other)), len(pairs))
        if place < len(pairs) or len(expected) != len(got):
            raise MisfitError(
                f"The engine reads other tokens than the model: {len(got)} instead of {len(expected)}, which differ "
                f"from position {place} on (there {got[place : place + 5]} instead of {expected[place : place + 5]}). "
                "Start it with the tokenizer of the model's LLM and with the model's own chat template, "
                f"--chat-template MODEL/chat_template.jinja. {HOW_TO_START}"
            )
        if max(got) > self.vocab_size:
            raise MisfitError(
                f"The engine's tokenizer has tokens beyond its LLM's {self.vocab_size}: it gives vectors the id "
                f"{max(got)}, at which a penalty on repetitions would end the engine. Write its files anew with "
                f"`python -m processing.serving.engine_files`. {HOW_TO_START}"
            )

    async def _ask(self, name: str, chat: list[dict]) -> _Answer:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        if self.processor.chat_template_kwargs:
            options["chat_template_kwargs"] = self.processor.chat_template_kwargs
        response = await self.engine.ask({"model": name, "messages": chat, "return_token_ids": True, **options})
        if response.status_code != 200:
            raise MisfitError(
                f"The engine refuses a prompt of this model's with status {response.status_code}: "
                f"{response.text[:500]}. It must run the model's own LLM, with --enable-prompt-embeds. {HOW_TO_START}"
            )
        answer = response.json()
        if not answer.get("prompt_token_ids"):
            raise MisfitError("The engine returns no prompt_token_ids, by which it is checked. Update it.")
        [token] = answer["choices"][0]["logprobs"]["content"]
        return _Answer(answer["prompt_token_ids"], {top["token"]: top["logprob"] for top in token["top_logprobs"]})
