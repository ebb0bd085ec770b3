"""Constrained answers of the stand-in engine: structured output and calls of tools, as vLLM with the parser `hermes`.

Leaves out: constraints that infinitely many texts fulfil (schemas are of enums, and of objects of enums, without white
space), and calls of tools that the model chooses itself.
"""

import itertools
import json
import re
import uuid

import torch
from transformers import LogitsProcessor

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def allowed_texts(body: dict) -> list[str] | None:
    """Return the texts that a request allows as its answer; None if it allows all."""
    if tools := forced_tools(body):
        return [
            f'<tool_call>{space}{{"name": "{tool["name"]}", "arguments": {arguments}}}{space}</tool_call>'
            for space in ("\n", "")
            for tool in tools
            for arguments in _texts_of(tool["parameters"])
        ]
    if structured := body.get("structured_outputs"):
        return structured["choice"]
    form = body.get("response_format") or {}
    return _texts_of(form["json_schema"]["schema"]) if form.get("type") == "json_schema" else None


def forced_tools(body: dict) -> list[dict]:
    """Return the functions of which a request demands a call."""
    tools, choice = [tool["function"] for tool in body.get("tools") or []], body.get("tool_choice")
    if isinstance(choice, dict):
        return [tool for tool in tools if tool["name"] == choice["function"]["name"]]
    return tools if choice == "required" else []


def _texts_of(schema: dict) -> list[str]:
    if "enum" in schema:
        return [json.dumps(value) for value in schema["enum"]]
    names = schema["properties"]
    members = [[f'"{name}":{text}' for text in _texts_of(names[name])] for name in names]
    return [f"{{{','.join(each)}}}" for each in itertools.product(*members)]


class OnlyTexts(LogitsProcessor):
    """Allows the tokens alone with which the answer still becomes one of some texts, of one character for each byte."""

    def __init__(self, texts: list[str], tokenizer, eos_ids: list[int]):
        self.texts, self.tokenizer, self.eos_ids = texts, tokenizer, eos_ids
        special = {*tokenizer.all_special_ids, *eos_ids}
        self.pieces = {each: tokenizer.decode([each]) for each in tokenizer.get_vocab().values() if each not in special}

    def __call__(self, input_ids, scores):
        text = self.tokenizer.decode(input_ids[0])
        rests = [each[len(text) :] for each in self.texts if each.startswith(text)]
        fitting = [each for each, piece in self.pieces.items() if any(rest.startswith(piece) for rest in rests)]
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, fitting + (self.eos_ids if "" in rests else [])] = 0
        return scores + allowed


def message_of(text: str, body: dict) -> dict:
    """Return the message of an answer, in which forced calls of tools are read."""
    calls = [json.loads(each) for each in CALL.findall(text)] if forced_tools(body) else []
    if not calls:
        return {"content": text}
    functions = [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls]
    calls = [{"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function} for function in functions]
    return {"content": CALL.sub("", text), "tool_calls": calls}


def reason_of(reason: str, body: dict) -> str:
    """Return why an answer has ended, as the protocol says it."""
    return "tool_calls" if reason == "stop" and body.get("tool_choice") == "required" else reason


def why_refused(body: dict) -> str | None:
    """Return the engine's words against a `tool_choice` that does not fit the tools."""
    choice, tools = body.get("tool_choice", "none"), body.get("tools")
    if choice != "none" and not tools:
        return "When using `tool_choice`, `tools` must be set."
    if isinstance(choice, dict) and not forced_tools(body):
        return "The tool specified in `tool_choice` does not match any of the specified `tools`"
    return None
