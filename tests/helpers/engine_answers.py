"""Requests for constrained answers, and what an engine's answers tell, at once or in pieces, to be compared."""

import json

import pytest

PERSONS = ("grace", "victor", "adam")
# The tiny world's LLM would put white space between the parts of JSON without end. 100 and 101 are its tokens of it.
NO_SPACE = {"max_tokens": 96, "logit_bias": {"100": -100, "101": -100}}


def _schema_of(**properties) -> dict:
    return {
        "type": "object",
        "properties": {name: {"enum": list(values)} for name, values in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def _tool(name: str, **parameters) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": _schema_of(**parameters), "strict": True}}


def _answer_of(schema: dict) -> dict:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"response_format": form, **NO_SPACE}


# All tell a person.
STRUCTURED = {
    "one of some texts": {"structured_outputs": {"choice": list(PERSONS)}},
    "one of some values": _answer_of({"enum": list(PERSONS)}),
    "an object": _answer_of(_schema_of(person=PERSONS, count=(1, 2, 3))),
}
CALLS = {
    "a call of one tool": {
        "tools": [_tool("greet", person=PERSONS), _tool("wait")],
        "tool_choice": {"type": "function", "function": {"name": "greet"}},
        **NO_SPACE,
    },
    "a call of some tool": {"tools": [_tool(person) for person in PERSONS], "tool_choice": "required", **NO_SPACE},
}
SAMPLES = {"n": 3, "temperature": 2.0, "seed": 7}


def who_is_told(answer: dict) -> str:
    """Return the person in the first choice of a constrained answer, of [`told`].

    Raises:
        ValueError: the answer has another form.
    """
    [choice, *_] = answer["choices"]
    text = choice["content"]
    if choice["calls"]:
        [(name, arguments)] = choice["calls"]
        text = arguments["person"] if name == "greet" else name
    elif text.startswith(("{", '"')):
        value = json.loads(text)
        text = value["person"] if isinstance(value, dict) else value
    if text not in PERSONS:
        raise ValueError(f"{answer} tells none of {PERSONS}.")
    return text


def told(answer: dict) -> dict:
    """Return what an answer tells, without what differs between any two, such as ids."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return _told([(choice, choice["message"]) for choice in choices], answer["usage"])


def told_in_pieces(pieces: list[dict]) -> dict:
    """Return what a stream tells, of whose pieces the last has the usage."""
    merged: dict[int, tuple[dict, dict]] = {}
    for piece in pieces:
        for each in piece["choices"]:
            choice, message = merged.setdefault(each["index"], ({}, {"content": "", "tool_calls": []}))
            delta = each["delta"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"function": {"name": "", "arguments": ""}})
                for name, text in call["function"].items():
                    message["tool_calls"][call["index"]]["function"][name] += text or ""
            choice.setdefault("token_ids", []).extend(each.get("token_ids") or [])
            if each.get("logprobs"):
                choice.setdefault("logprobs", {"content": []})["content"] += each["logprobs"]["content"]
            choice.update({name: each[name] for name in ("finish_reason", "stop_reason") if each.get(name)})
    return _told([merged[index] for index in sorted(merged)], pieces[-1]["usage"])


def _told(choices: list[tuple[dict, dict]], usage: dict) -> dict:
    answer = {"usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}, "choices": []}
    answer["logprobs"] = []
    for choice, message in choices:
        tokens = [(each, *each.get("top_logprobs", [])) for each in (choice.get("logprobs") or {}).get("content", [])]
        answer["logprobs"] += [each["logprob"] for token in tokens for each in token]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        answer["choices"].append(
            {
                "content": message["content"] or "",
                "calls": [(call["name"], json.loads(call["arguments"])) for call in calls],
                "tokens": [[each["token"] for each in token] for token in tokens],
                "token_ids": choice.get("token_ids") or [],
                **{name: choice.get(name) for name in ("finish_reason", "stop_reason")},
            }
        )
    return answer


def is_same(first: dict, second: dict) -> bool:
    """Return whether two answers tell the same, but for the rounding of log-probabilities."""
    one, other = dict(first), dict(second)
    return one.pop("logprobs") == pytest.approx(other.pop("logprobs"), abs=1e-3) and one == other
