"""The structure of LLM families' chat templates, in small templates of our own, for the laws over them.

Each writes the special tokens, turns, generation prompt, system handling, thoughts and tools as its family does, and
nothing of the wording: markers, trimming and order are what the laws depend on. Line breaks are written as N, since
jinja drops some that stand beside a block.
"""

from dataclasses import dataclass, field

N = "{{ '\n' }}"
ALTERNATE = (
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}"
)
CALLS = "{%- for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}"
# A system message joins a user turn: takes it away, and keeps it as `lead`.
TAKE_SYSTEM = (
    "{%- set lead = '' -%}{%- if messages[0].role == 'system' -%}"
    "{%- set lead = BEFORE ~ messages[0].content ~ AFTER -%}{%- set messages = messages[1:] -%}{%- endif -%}"
)


@dataclass
class Family:
    """A template and what is known of it.

    `ends`: the tokens that generation stops at; `in_parts`: content is expected as a list of parts; `warns`: what the
    processor warns of without the options.
    """

    template: str | dict
    special: list[str]
    ends: list[str]
    options: dict = field(default_factory=dict)
    in_parts: bool = False
    warns: str | None = None


def prompted(prompt: str) -> str:
    return "{%- if add_generation_prompt -%}" + prompt + "{%- endif -%}"


def chatml(before="", thought="", prompt="", answer="{{ m.content }}") -> str:
    """The turns of Qwen and its many relatives."""
    return (
        "{%- if tools %}<|im_start|>system"
        + N
        + "{{ tools | tojson }}<|im_end|>"
        + N
        + "{% endif -%}"
        + before
        + "{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}"
        + N
        + "{%- if m.role == 'assistant' -%}"
        + thought
        + answer
        + CALLS
        + "{%- else %}{{ m.content }}{% endif -%}"
        + "<|im_end|>"
        + N
        + "{%- endfor -%}"
        + prompted("<|im_start|>assistant" + N + prompt)
    )


def default_system(text: str) -> str:
    return "{%- if messages[0].role != 'system' %}<|im_start|>system" + N + text + "<|im_end|>" + N + "{% endif -%}"


IM = ["<|im_start|>", "<|im_end|>"]
GEMMA = ["<start_of_turn>", "<end_of_turn>"]
GLM = ["[gMASK]", "<sop>", "<|observation|>"]
IS_QUICK = "enable_thinking is defined and not enable_thinking"
EMPTY_THOUGHT = "<think>" + N + N + "</think>" + N
WITHOUT_THOUGHT = "{{ m.content.split('</think>')[-1].lstrip() }}"
THINKS = "has the option 'enable_thinking', which is not set"

FAMILIES = {
    "llama2": Family(
        TAKE_SYSTEM.replace("BEFORE", "'<<SYS>>\n'").replace("AFTER", "'\n<</SYS>>\n\n'")
        + "{%- for m in messages -%}"
        + ALTERNATE
        + "{%- if m.role == 'user' -%}"
        + "{{ bos_token ~ '[INST] ' ~ (lead if loop.first else '') ~ m.content.strip() ~ ' [/INST]' }}"
        + "{%- else %}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{% endif -%}{%- endfor -%}",
        [],
        ["<|end|>"],
    ),
    "llama3": Family(
        "{{ bos_token }}{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        + N
        + N
        + "{{ m.content | trim }}"
        + CALLS
        + "<|eot_id|>{% endfor -%}"
        + prompted("<|start_header_id|>assistant<|end_header_id|>" + N + N),
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<|eot_id|>", "<|end|>"],
    ),
    "qwen2.5": Family(chatml(default_system("Be of help.")), IM, IM[1:]),
    "qwen3": Family(
        chatml(
            thought="{%- if loop.last %}" + EMPTY_THOUGHT + N + "{% endif -%}",
            prompt="{%- if " + IS_QUICK + " %}" + EMPTY_THOUGHT + N + "{% endif -%}",
            answer=WITHOUT_THOUGHT,
        ),
        IM,
        IM[1:],
        {"enable_thinking": False},
        warns=THINKS,
    ),
    "mistral v1": Family(
        "{{ bos_token }}{%- for m in messages -%}"
        + ALTERNATE
        + "{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        + "{%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif -%}"
        + "{%- endfor -%}",
        [],
        ["<|end|>"],
    ),
    "mistral v3": Family(
        TAKE_SYSTEM.replace("BEFORE", "''").replace("AFTER", "'\n\n'")
        + "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        + "{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}"
        + "[INST] {{ (lead if loop.last else '') ~ m.content }}[/INST]"
        + "{%- elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        + "{%- elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function | tojson }}{{ eos_token }}"
        + "{%- else %} {{ m.content | trim }}{{ eos_token }}{% endif -%}{%- endfor -%}",
        ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"],
        ["<|end|>"],
    ),
    "mistral tekken": Family(
        "{{ bos_token }}{%- for m in messages -%}"
        + "{%- if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        + "{%- elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif -%}"
        + "{%- endfor -%}",
        ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"],
        ["<|end|>"],
    ),
    "gemma2": Family(
        "{{ bos_token }}{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}"
        + "{%- for m in messages -%}"
        + ALTERNATE
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        + N
        + "{{ m.content | trim }}<end_of_turn>"
        + N
        + "{%- endfor -%}"
        + prompted("<start_of_turn>model" + N),
        GEMMA,
        ["<end_of_turn>", "<|end|>"],
    ),
    "gemma3": Family(
        "{{ bos_token }}{%- for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        + N
        + "{%- if m.content is string %}{{ m.content | trim }}"
        + "{%- else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif -%}"
        + "<end_of_turn>"
        + N
        + "{%- endfor -%}"
        + prompted("<start_of_turn>model" + N),
        GEMMA,
        ["<end_of_turn>", "<|end|>"],
    ),
    "phi3": Family(
        "{%- for m in messages %}<|{{ m.role }}|>"
        + N
        + "{{ m.content }}<|stop|>"
        + N
        + "{%- endfor -%}"
        + "{%- if add_generation_prompt %}<|assistant|>"
        + N
        + "{% else %}{{ eos_token }}{% endif -%}",
        ["<|stop|>"],
        ["<|stop|>", "<|end|>"],
    ),
    "phi4": Family(
        "{%- for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor -%}"
        + prompted("<|im_start|>assistant<|im_sep|>"),
        [*IM, "<|im_sep|>"],
        IM[1:],
    ),
    "smollm2": Family(chatml(default_system("I am small.")), IM, IM[1:]),
    "smollm3": Family(
        "{%- set thinks = enable_thinking | default(true) -%}"
        + chatml(
            "<|im_start|>system" + N + "Reasoning: {{ '/think' if thinks else '/no_think' }}<|im_end|>" + N,
            thought="{%- if not thinks %}" + EMPTY_THOUGHT + "{% endif -%}",
            prompt="{%- if not thinks %}" + EMPTY_THOUGHT + "{% endif -%}",
        ),
        IM,
        IM[1:],
        {"enable_thinking": False},
        warns=THINKS,
    ),
    "deepseek r1 distill": Family(
        "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' %}{{ m.content }}"
        + "{%- elif m.role == 'user' %}<user>{{ m.content }}"
        + "{%- else %}<assistant>"
        + WITHOUT_THOUGHT
        + "{{ eos_token }}{% endif -%}{%- endfor -%}"
        + prompted("<assistant><think>" + N),
        ["<user>", "<assistant>"],
        ["<|end|>"],
        warns="opens a thought in every prompt, which ends in",
    ),
    "glm4": Family(
        "[gMASK]<sop>{%- for m in messages %}<|{{ m.role }}|>"
        + N
        + "{{ m.content }}{% endfor -%}"
        + prompted("<|assistant|>"),
        GLM,
        ["<|end|>", "<|user|>", "<|observation|>"],
    ),
    "glm4.5": Family(
        "[gMASK]<sop>{%- for m in messages %}<|{{ m.role }}|>"
        + N
        + "{%- if m.role == 'assistant' %}<think></think>"
        + N
        + "{% endif -%}"
        + "{{ m.content }}{{ '/nothink' if m.role == 'user' and "
        + IS_QUICK
        + " }}{%- endfor -%}"
        + prompted("<|assistant|>{{ '\n<think></think>' if " + IS_QUICK + " }}"),
        GLM,
        ["<|end|>", "<|user|>", "<|observation|>"],
        {"enable_thinking": False},
        warns=THINKS,
    ),
    "granite3": Family(
        "{%- if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Be Granite.<|eot|>"
        + N
        + "{% endif -%}{%- for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
        + CALLS
        + "<|eot|>"
        + N
        + "{%- endfor -%}"
        + prompted("<|start_of_role|>assistant{{ (controls | tojson) if controls }}<|end_of_role|>"),
        ["<|start_of_role|>", "<|end_of_role|>", "<|eot|>"],
        ["<|eot|>"],
        {"controls": {"length": "short"}},
    ),
    "olmo2": Family(
        "{{ bos_token }}{%- for m in messages %}<|{{ m.role }}|>"
        + N
        + "{{ m.content }}"
        + "{{ eos_token if m.role == 'assistant' }}{{ '' if loop.last else '\n' }}{% endfor -%}"
        + "{{ '\n' if messages[-1].role != 'assistant' }}"
        + prompted("<|assistant|>" + N),
        [],
        ["<|end|>"],
    ),
    "command-r": Family(
        {
            "default": "{{ bos_token }}{%- for m in messages %}<|TURN|><|{{ m.role | upper }}|>"
            "{{ m.content.strip() }}<|STOP|>{% endfor -%}" + prompted("<|TURN|><|ASSISTANT|>"),
            "rag": "{%- for d in documents %}{{ d.text }}{% endfor %}{{ messages[-1].content }}",
        },
        ["<|TURN|>", "<|STOP|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"],
        ["<|STOP|>"],
    ),
    "gpt-oss": Family(
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|stop|>"
        + "{%- for m in messages -%}{%- if m.role == 'assistant' %}<|start|>assistant"
        + "{%- if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|stop|><|start|>assistant{% endif -%}"
        + "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|stop|>' }}"
        + "{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|stop|>{% endif -%}{%- endfor -%}"
        + prompted("<|start|>assistant"),
        ["<|start|>", "<|message|>", "<|channel|>", "<|stop|>", "<|return|>"],
        ["<|return|>", "<|end|>"],
        {"reasoning_effort": "low"},
        warns="writes channels",
    ),
    "idefics3": Family(
        "{{ bos_token }}{%- for m in messages -%}"
        + "{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
        + "{%- for part in m.content %}{{ part.text if part.type == 'text' }}{% endfor %}<end_of_utterance>"
        + N
        + "{%- endfor -%}"
        + prompted("Assistant:"),
        ["<end_of_utterance>"],
        ["<end_of_utterance>", "<|end|>"],
        in_parts=True,
    ),
    "llava_next": Family(
        "{%- for m in messages -%}{%- if m.role == 'system' -%}"
        + "{{ '<<SYS>>\n' + m.content[0]['text'] + '\n<</SYS>>\n\n' }}"
        + "{%- elif m.role == 'user' %}[INST] {% for part in m.content | selectattr('type', 'equalto', 'image') -%}"
        + "{{ '<image>\n' }}{%- endfor -%}{%- for part in m.content | selectattr('type', 'equalto', 'text') -%}"
        + "{{ part.text }}{%- endfor -%}{{ ' [/INST]' }}"
        + "{%- else %}{{ ' ' + m.content[0]['text'] + eos_token + ' ' }}{% endif -%}{%- endfor -%}",
        [],
        ["<|end|>"],
        in_parts=True,
    ),
}
