"""A stand-in for vLLM's OpenAI server: its routes, content parts, answers and errors, on transformers' `generate`.

`tests/real_engine/` compares it with the real engine, whose messages it repeats word for word. It answers each request
alone. Leaves out: batching, the prefix cache, and what `constrained_answers.py` leaves out.

    python -m tests.helpers.stand_in_engine --model LLM --chat-template FILE --enable-prompt-embeds --port 8000
"""

import asyncio
import base64
import binascii
import copy
import io
import json
import re
import threading
import time
import uuid
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, StoppingCriteria

from .constrained_answers import OnlyTexts, allowed_texts, forced_tools, message_of, reason_of, why_refused

PLACEHOLDER = "<prompt_embeds>"
LOOPS_OVER_PARTS = re.compile(r"for \w+ in \w+(\.content|\[['\"]content['\"]\])")


class Refused(Exception):
    """An answer of status 4xx."""

    def __init__(self, message, param=None, status=400, kind="BadRequestError"):
        named = f"{message} (parameter={param})" if param and kind == "BadRequestError" else message
        super().__init__(named)
        self.status, self.error = status, {"message": named, "type": kind, "param": param, "code": status}


@dataclass
class Prompt:
    ids: list[int]  # the placeholder's at embedded positions
    embeds: torch.Tensor  # (1, L, D)
    is_embedded: torch.Tensor  # (1, L, 1)


@dataclass
class Token:
    id: int
    text: str
    logprobs: torch.Tensor  # (V,)


@dataclass
class Finished:
    reason: str
    stop: str | None = None


class _Bias(LogitsProcessor):
    """Adds `logit_bias`, and keeps the log-probs of the step."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, input_ids, scores):
        scores = scores + self.bias
        self.logprobs = scores[0].float().log_softmax(-1)
        return scores


class _HandOn(StoppingCriteria):
    """Hands every token on with its log-probs, and ends the generation if the client has left."""

    def __init__(self, bias, hand_on, cancelled, seconds_per_token):
        self.bias, self.hand_on, self.cancelled, self.seconds = bias, hand_on, cancelled, seconds_per_token

    def __call__(self, input_ids, scores, **kwargs):
        time.sleep(self.seconds)
        self.hand_on((int(input_ids[0, -1]), self.bias.logprobs))
        return torch.full((len(input_ids),), self.cancelled.is_set())


@dataclass
class Engine:
    """The parts of `stand_in_engine`; see there."""

    llm: torch.nn.Module
    tokenizer: object
    chat_template: str | None
    prompt_embeds: bool
    adapters: dict
    has_plugin: bool
    seconds_per_token: float = 0.0
    is_embedded: torch.Tensor | None = field(default=None, init=False)

    def __post_init__(self):
        # Copies, because the caller's model must not get LoRA layers and its tokenizer no placeholder.
        self.llm, self.tokenizer = copy.deepcopy(self.llm).eval(), copy.deepcopy(self.tokenizer)
        self.max_length = self.llm.config.get_text_config().max_position_embeddings
        own = self.llm.generation_config
        self.default_max_tokens = own.max_new_tokens
        self.eos_ids = [own.eos_token_id] if isinstance(own.eos_token_id, int) else list(own.eos_token_id or [])
        # Of the LLM's own settings vLLM keeps few: the ends of answers are what the tests depend on.
        self.llm.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=own.pad_token_id or 0)
        self.embed = self.llm.get_input_embeddings()
        if self.prompt_embeds:
            self.tokenizer.add_special_tokens(
                {"additional_special_tokens": [PLACEHOLDER]}, replace_extra_special_tokens=False
            )
        self.template = self.chat_template or self.tokenizer.chat_template
        self.lock = threading.Lock() if self.adapters else nullcontext()
        self.peft = None
        for name, folder in self.adapters.items():
            from peft import PeftModel

            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.llm, folder, adapter_name=name)
            else:
                self.peft.load_adapter(folder, name)
        for name, module in self.llm.named_modules():
            if self.has_plugin and ".lora_A." in name:
                module.register_forward_hook(self._at_embedded_positions)

    def _at_embedded_positions(self, module, inputs, output):
        if output.shape[1] == self.is_embedded.shape[1]:
            return output * self.is_embedded.to(output)
        return output * 0  # a step of decoding

    # -- prompts ------------------------------------------------------------------------------------------------------

    def read_part(self, part) -> torch.Tensor:
        if not self.prompt_embeds:
            raise Refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`", "prompt_embeds")
        if not part.get("data"):
            raise Refused(
                "prompt_embeds content part requires a non-empty `data` field with base64-encoded tensor bytes.",
                "prompt_embeds",
            )
        try:
            data = base64.b64decode(part["data"], validate=True)
        except binascii.Error as error:
            raise Refused("Non-base64 digit found") from error
        try:
            embeds = torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            raise Refused("`prompt_embeds` could not be deserialized as a torch tensor", "prompt_embeds") from error
        width = self.embed.weight.shape[1]
        if embeds.ndim != 2 or embeds.shape[1] != width:
            raise Refused(
                f"`prompt_embeds` hidden_size {embeds.shape[-1]} does not match the model's hidden_size {width}.",
                "prompt_embeds",
            )
        if not embeds.is_floating_point():
            raise Refused(
                f"`prompt_embeds` dtype {embeds.dtype} is not a floating-point type, cannot safely cast to the model's "
                f"dtype {self.llm.dtype}.",
                "prompt_embeds",
            )
        if len(embeds) == 0:
            raise Refused("Expected 1 prompt_embeds placeholder spans in the tokenized prompt, found 0.")
        return embeds.to(self.llm.dtype)

    def read_messages(self, messages) -> tuple[list[dict], list[torch.Tensor]]:
        """Return the chat as vLLM gives it to a template, and its embedded parts."""
        is_in_parts = LOOPS_OVER_PARTS.search(self.template) is not None
        chat, embedded = [], []
        for message in messages:
            content = message.get("content")
            texts = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
                if part.get("type") == "prompt_embeds":
                    embedded.append(self.read_part(part))
                    texts.append(PLACEHOLDER)
                elif part.get("type") == "text":
                    if self.prompt_embeds and PLACEHOLDER in part["text"]:
                        raise Refused(
                            f"Text content may not contain the reserved placeholder '{PLACEHOLDER}'. This placeholder "
                            "is used internally to mark `prompt_embeds` splice positions in the tokenized prompt.",
                            "messages",
                        )
                    texts.append(part["text"])
                else:
                    raise Refused("llm is not a multimodal model")
            as_parts = is_in_parts and message["role"] != "tool"
            content = [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)
            kept = {name: message[name] for name in ("role", "name", "tool_call_id") if name in message}
            calls = copy.deepcopy(message.get("tool_calls") or [])
            for call in calls:
                if isinstance(call["function"].get("arguments"), str):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
            chat.append({**kept, "content": content, **({"tool_calls": calls} if calls else {})})
        return chat, embedded

    def prompt_of(self, body: dict) -> Prompt:
        if body.get("chat_template"):
            raise Refused(
                "Chat template is passed with request, but --trust-request-chat-template is not set. Refused request "
                "with untrusted chat template."
            )
        chat, embedded = self.read_messages(body["messages"])
        options = {"tools": body.get("tools"), **(body.get("chat_template_kwargs") or {})}
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, chat_template=self.template, add_generation_prompt=True, tokenize=False, **options
            )
        except TemplateError as error:
            raise Refused(str(error)) from error
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        placeholder_id = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER) if self.prompt_embeds else None
        if embedded and ids.count(placeholder_id) != len(embedded):
            found = f"prompt_embeds placeholder tokens in the rendered prompt, found {ids.count(placeholder_id)}"
            raise Refused(f"Expected {len(embedded)} {found}.")
        if embedded and body.get("use_beam_search"):
            raise Refused("Embedding prompt not supported for beam search", status=501, kind="NotImplementedError")
        expanded, parts, waiting = [], [], iter(embedded)
        for token_id in ids:
            if token_id == placeholder_id:
                part = next(waiting)
                expanded += [token_id] * len(part)
            else:
                part = self.embed(torch.tensor([token_id])).detach()
                expanded.append(token_id)
            parts.append(part)
        is_embedded = torch.tensor(expanded) == (-1 if placeholder_id is None else placeholder_id)
        if len(expanded) >= self.max_length:
            raise Refused(
                f"This model's maximum context length is {self.max_length} tokens. However, your prompt contains "
                f"{len(expanded)} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                "the length of the input prompt.",
                "input_tokens",
            )
        return Prompt(expanded, torch.cat(parts)[None], is_embedded[None, :, None])

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, body: dict, adapter: str | None, seed: int | None, hand_on, cancelled):
        """Answer in this thread; `hand_on` gets every token and its log-probs, and then None or an exception."""
        try:
            bias = torch.zeros(self.embed.weight.shape[0])
            for token_id, value in (body.get("logit_bias") or {}).items():
                bias[int(token_id)] = value
            processor, texts = _Bias(bias), allowed_texts(body)
            constraints = [] if texts is None else [OnlyTexts(texts, self.tokenizer, self.eos_ids)]
            temperature = 1.0 if body.get("temperature") is None else body["temperature"]
            sampling = {"do_sample": False}
            if temperature > 0:
                top_k, top_p = body.get("top_k") or 0, body.get("top_p") or 1.0
                sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": max(0, top_k)}
            room = self.max_length - len(prompt.ids)
            wanted = body.get("max_completion_tokens") or body.get("max_tokens") or self.default_max_tokens or room
            with self.lock, torch.random.fork_rng():
                if seed is not None:
                    torch.manual_seed(seed)
                self.is_embedded = prompt.is_embedded
                if adapter is not None:
                    self.peft.set_adapter(adapter)
                with self.peft.disable_adapter() if self.peft and adapter is None else nullcontext():
                    self.llm.generate(
                        inputs_embeds=prompt.embeds,
                        attention_mask=torch.ones(prompt.embeds.shape[:2], dtype=torch.long),
                        max_new_tokens=min(wanted, room),
                        logits_processor=[*constraints, processor],
                        stopping_criteria=[_HandOn(processor, hand_on, cancelled, self.seconds_per_token)],
                        **sampling,
                    )
            hand_on(None)
        except Exception as error:  # goes on in the event loop
            hand_on(error)

    async def tokens(self, prompt, body, adapter, seed) -> AsyncIterator[Token | Finished]:
        """Yield the tokens of an answer as they come, and how it ended. Closing it ends the generation."""
        loop, queue, cancelled = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def hand_on(item):
            loop.call_soon_threadsafe(queue.put_nowait, item)

        arguments = (prompt, body, adapter, seed, hand_on, cancelled)
        threading.Thread(target=self.generate, args=arguments, daemon=True).start()
        pieces = DecodeStream([], skip_special_tokens=True)
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
        held, reserve = "", max(map(len, stops), default=1) - 1  # so much may be the beginning of a stop string
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                token_id, logprobs = item
                if token_id in self.eos_ids:
                    yield Token(token_id, held, logprobs)
                    yield Finished("stop")
                    return
                held += pieces.step(self.tokenizer._tokenizer, token_id) or ""
                found = min(((held.index(stop), stop) for stop in stops if stop in held), default=None)
                if found is not None:
                    yield Token(token_id, held[: found[0]], logprobs)
                    yield Finished("stop", found[1])
                    return
                sent = held[: len(held) - reserve]
                held = held[len(sent) :]
                yield Token(token_id, sent, logprobs)
            yield Finished("length")
        finally:
            cancelled.set()

    def logprobs_of(self, token: Token, body: dict) -> dict | None:
        if not body.get("logprobs"):
            return None

        def entry(token_id):
            text = self.tokenizer.decode([token_id])
            return {"token": text, "logprob": float(token.logprobs[token_id]), "bytes": list(text.encode())}

        top = token.logprobs.topk(body.get("top_logprobs") or 0).indices.tolist()
        return {"content": [{**entry(token.id), "top_logprobs": [entry(token_id) for token_id in top]}]}


def stand_in_engine(
    llm,
    tokenizer,
    chat_template=None,
    *,
    served_name="llm",
    prompt_embeds=True,
    adapters=None,
    has_plugin=True,
    seconds_per_token=0.0,
) -> Starlette:
    """Return the ASGI app. `app.state.requests` collects the bodies of chat requests.

    `app.state.before_answer`, if set, is awaited with the body before an answer begins.

    Args:
        llm, tokenizer: of transformers; copied.
        chat_template: the LLM's own if omitted.
        prompt_embeds: as with `--enable-prompt-embeds`.
        adapters: names to folders of partial LoRAs, as with `--lora-modules`.
        has_plugin: False: they act at every position, as without the plugin.
        seconds_per_token: what a step takes at least.
    """
    engine = Engine(llm, tokenizer, chat_template, prompt_embeds, adapters or {}, has_plugin, seconds_per_token)
    names = {served_name: None, **{name: name for name in engine.adapters}}

    def refusing(handle):
        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except Refused as refused:
                return JSONResponse({"error": refused.error}, refused.status)

        return handler

    async def read_body(request: Request) -> dict:
        try:
            body = await request.json()
        except ValueError as error:
            raise Refused("1 validation error: JSON decode error", kind="Bad Request") from error
        if body.get("model") is not None and body["model"] not in names:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {', '.join(names)}."
            raise Refused(message, "model", 404, "NotFoundError")
        return body

    async def chat(request: Request) -> Response:
        body = await read_body(request)
        app.state.requests.append(body)
        if not isinstance(body.get("messages"), list):
            raise Refused("1 validation error: body.messages: Field required", "body.messages", kind="Bad Request")
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is not None and body[name] < 1:
                raise Refused(f"max_tokens must be at least 1, got {body[name]}.", "max_tokens")
        if (body.get("temperature") or 0) < 0:
            raise Refused(f"temperature must be non-negative, got {body['temperature']}.", "temperature")
        if (body.get("n") or 1) > 1 and body.get("temperature") == 0:
            raise Refused(f"n must be 1 when using greedy sampling, got {body['n']}.")
        if (reason := why_refused(body)) is not None:
            raise Refused(reason, "tool_choice")
        prompt = engine.prompt_of(body)
        if app.state.before_answer is not None:
            await app.state.before_answer(body)
        adapter, ids = names[body.get("model") or served_name], body.get("return_token_ids")
        seeds = [None if body.get("seed") is None else body["seed"] + index for index in range(body.get("n") or 1)]
        answers = [engine.tokens(prompt, body, adapter, seed) for seed in seeds]
        head = {"id": f"chatcmpl-{uuid.uuid4().hex[:16]}", "created": int(time.time()), "model": body.get("model")}
        if body.get("stream"):
            return StreamingResponse(stream(answers, prompt, body, head), media_type="text/event-stream")
        choices, num_new = [], 0
        for index, answer in enumerate(answers):
            tokens: list[Token] = []
            if not bool(prompt.embeds.isfinite().all()):  # as the engine does: an empty text and no error
                finished = Finished("length")
            else:
                async for item in answer:
                    if isinstance(item, Finished):
                        finished = item
                    else:
                        tokens.append(item)
                    if await request.is_disconnected():
                        app.state.num_aborted += 1
                        await answer.aclose()
                        return Response(status_code=499)
            num_new += len(tokens)
            logprobs = [engine.logprobs_of(token, body) for token in tokens]
            message = message_of("".join(token.text for token in tokens), body)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", **message},
                    "logprobs": {"content": [each["content"][0] for each in logprobs]} if any(logprobs) else None,
                    "finish_reason": reason_of(finished.reason, body),
                    "stop_reason": finished.stop,
                    "token_ids": [token.id for token in tokens] if ids else None,
                }
            )
        usage = usage_of(prompt, num_new)
        prompt_ids = prompt.ids if ids else None
        more = {"object": "chat.completion", "choices": choices, "usage": usage, "prompt_token_ids": prompt_ids}
        return JSONResponse({**head, **more})

    async def stream(answers, prompt, body, head) -> AsyncIterator[str]:
        def event(choices, **more):
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        ids, num_new, is_done = body.get("return_token_ids"), 0, False
        try:
            for index in range(len(answers)):
                first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event([first], **({"prompt_token_ids": prompt.ids} if ids else {}))
            for index, answer in enumerate(answers):
                text = ""
                async for item in answer:
                    choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
                    if isinstance(item, Finished):
                        choice |= {"finish_reason": reason_of(item.reason, body), "stop_reason": item.stop}
                        if calls := message_of(text, body).get("tool_calls"):
                            choice["delta"] = {"tool_calls": [{"index": n, **call} for n, call in enumerate(calls)]}
                    else:
                        num_new, text = num_new + 1, text + item.text
                        delta = {} if forced_tools(body) else {"content": item.text}
                        choice |= {"delta": delta, "logprobs": engine.logprobs_of(item, body)}
                        choice |= {"token_ids": [item.id]} if ids else {}
                    yield event([choice])
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event([], usage=usage_of(prompt, num_new))
            yield "data: [DONE]\n\n"
            is_done = True
        finally:
            if not is_done:
                app.state.num_aborted += 1
                for answer in answers:
                    await answer.aclose()

    def usage_of(prompt: Prompt, num_new: int) -> dict:
        counts = {"prompt_tokens": len(prompt.ids), "completion_tokens": num_new}
        return {**counts, "total_tokens": sum(counts.values())}

    async def tokenize(request: Request) -> Response:
        body = await read_body(request)
        if "prompt" in body:
            ids = engine.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        else:
            ids = engine.prompt_of(body).ids
        return JSONResponse({"count": len(ids), "max_model_len": engine.max_length, "tokens": ids})

    async def models(request: Request) -> Response:
        base = {"object": "model", "owned_by": "vllm", "created": 0}
        cards = [{**base, "id": served_name, "parent": None, "max_model_len": engine.max_length}]
        cards += [
            {**base, "id": name, "root": str(folder), "parent": served_name, "max_model_len": None}
            for name, folder in engine.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def health(request: Request) -> Response:
        return Response()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", refusing(chat), methods=["POST"]),
            Route("/tokenize", refusing(tokenize), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )
    app.state.requests, app.state.before_answer, app.state.num_aborted = [], None, 0
    return app


def main():
    import uvicorn

    parser = ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat-template", type=Path)
    parser.add_argument("--enable-prompt-embeds", action="store_true")
    parser.add_argument("--lora-modules", nargs="*", default=[], help="NAME=FOLDER")
    parser.add_argument("--served-model-name", default="llm")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--without-plugin", action="store_true")
    parser.add_argument("--seconds-per-token", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    app = stand_in_engine(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(options.model),
        options.chat_template and options.chat_template.read_text(),
        served_name=options.served_model_name,
        prompt_embeds=options.enable_prompt_embeds,
        adapters=dict(module.split("=", 1) for module in options.lora_modules),
        has_plugin=not options.without_plugin,
        seconds_per_token=options.seconds_per_token,
    )
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
