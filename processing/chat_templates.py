"""Extend an LLM's chat template to audio blocks, check its options, and warn if it opens a thought.

Follows the arguments that transformers passes to chat templates. `data_collator.py` tokenises the prompts.
"""

import inspect
import json
import re

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

# This goes before an LLM's own chat template. It turns each message's list of blocks into the string that the LLM's
# template expects, with one line per block and the placeholder for each audio. It must not strip the text after it,
# because white space at the start of the LLM's template is part of its prompts.
FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is not string -%}
{%- set text = namespace(lines=[]) -%}
{%- for block in message.content -%}
{%- if block.type == "audio" -%}
{%- set text.lines = text.lines + ["AUDIO_TOKEN"] -%}
{%- elif block.type == "text" -%}
{%- set text.lines = text.lines + [block.text] -%}
{%- else -%}
{{- raise_exception("Message content must be of type 'text' or 'audio', got '" ~ block.type ~ "'.") -}}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=text.lines | join("\\n"))] -%}
{%- else -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
# If the LLM's template expects lists of parts (Idefics3, LLaVA-NeXT), this goes between the two. Each message's text
# becomes its only part, so that the template cannot reorder or join parts.
WRAP_CONTENT = """\
{%- set wrapped = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set wrapped.messages = wrapped.messages + [dict(message, content=[{"type": "text", "text": message.content}])] -%}
{%- else -%}
{%- set wrapped.messages = wrapped.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = wrapped.messages %}
"""
# For an LLM without a chat template: one turn per line.
PLAIN_TEMPLATE = """\
{{- bos_token or "" -}}
{%- for message in messages -%}
{{- message.content ~ (eos_token if message.role == "assistant" else "\\n") -}}
{%- endfor -%}
"""

# How LLMs mark a thought: its start and its end.
THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final"),
)
# Arguments of `apply_chat_template` belong to a call, not to a model.
ARGUMENTS_OF_A_CALL = set(inspect.signature(ProcessorMixin.apply_chat_template).parameters)


def with_audio_blocks(
    tokenizer: PreTrainedTokenizerBase, audio_token: str, chat_template_kwargs: dict | None
) -> tuple[str | dict[str, str], str, dict]:
    """Extend the chat template of an LLM's tokenizer, or its several named ones, to audio blocks.

    Returns:
        the extended template or templates, the LLM's own default template, and a copy of the options.

    Raises:
        TypeError, ValueError: see [`check_options`] and [`content_prefix`].
    """
    own = tokenizer.chat_template or PLAIN_TEMPLATE
    options = check_options(chat_template_kwargs, own)
    if not isinstance(own, dict):
        return content_prefix(own, tokenizer, audio_token, options) + own, own, options
    default = own.get("default", next(iter(own.values())))
    prefix = content_prefix(default, tokenizer, audio_token, options)
    return {name: prefix + each for name, each in own.items()}, default, options


def content_prefix(template: str, tokenizer: PreTrainedTokenizerBase, audio_token: str, options: dict) -> str:
    """Return the prefix that makes an LLM's chat template accept blocks of text and audio.

    Templates that expect strings receive strings, and those that expect lists of parts receive lists. The function
    renders a chat with one audio in both forms to find out which the template expects.

    Raises:
        ValueError: in neither form does the template write the placeholder exactly once and in its place.
    """
    blocks = [{"type": "text", "text": "before"}, {"type": "audio"}, {"type": "text", "text": "after"}]
    as_string = FLATTEN_CONTENT.replace("AUDIO_TOKEN", audio_token)
    lost = None
    for prefix in (as_string, as_string + WRAP_CONTENT):
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": blocks}],
                chat_template=prefix + template,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception:  # templates raise errors of any kind for a form that they do not expect
            continue
        if prompt.count(audio_token) == 1 and f"before\n{audio_token}\nafter" in prompt:
            return prefix
        lost = prompt
    if lost is not None:
        raise ValueError(
            f"The chat template does not write the audio placeholder {audio_token!r} once and in its place: of a user "
            f"turn 'before\\n{audio_token}\\nafter' it makes {lost!r:.300}. It has to write a message's content as it "
            "is, as a string or as a list of parts of type 'text'. Set the chat_template of the LLM's tokenizer to "
            "one that does, and save it."
        )
    return as_string  # the template refuses such chats altogether, and says why when it is used


def check_options(options: dict | None, chat_template: str | dict | None) -> dict:
    """Return a copy of the options of a chat template.

    Raises:
        TypeError: the options are not a dict of names to values that JSON can represent.
        ValueError: a name belongs to `apply_chat_template`, or the template does not use it.
    """
    options = {} if options is None else options
    try:
        copy = json.loads(json.dumps(options))
        if not isinstance(options, dict) or copy != options:
            raise TypeError("no dict of strings to values of JSON")
    except (TypeError, ValueError) as error:
        raise TypeError(
            "chat_template_kwargs must be a dict of names to values that JSON can hold, such as "
            f"{{'enable_thinking': False}}, got {options!r:.200} ({error})."
        ) from error
    if reserved := sorted(set(options) & ARGUMENTS_OF_A_CALL):
        raise ValueError(
            f"chat_template_kwargs holds {reserved}, which apply_chat_template takes for each chat. Give them there."
        )
    templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template or ""]
    if chat_template and (unknown := [name for name in options if not any(knows(each, name) for each in templates)]):
        raise ValueError(
            f"The chat template does not know the option(s) {unknown} of chat_template_kwargs, so they would change "
            "nothing. Its options are the variables in its text (processor.chat_template)."
        )
    return copy


def read_options(chat_template_kwargs: str | None) -> dict:
    """Return the option `--chat_template_kwargs` as keyword arguments of a processor; an empty dict if not given.

    Raises:
        ValueError: the option is not JSON.
    """
    if chat_template_kwargs is None:
        return {}
    try:
        return {"chat_template_kwargs": json.loads(chat_template_kwargs)}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--chat_template_kwargs must be a JSON object such as '{{\"enable_thinking\": false}}', got "
            f"{chat_template_kwargs!r}: {error}."
        ) from error


def knows(template: str, option: str) -> bool:
    """Return whether a template reads a variable of this name."""
    return re.search(rf"(?<![\w.]){re.escape(option)}\b", template) is not None


def is_in_thought(text: str) -> bool:
    """Return whether a text ends inside a thought, that is, a thought is opened and not closed."""
    return any(text.rfind(start) > text.rfind(end) for start, end in THOUGHT_MARKS)


def warn_of_thoughts(template: str, processor: ProcessorMixin):
    """Warn if answers may land inside a thought.

    Args:
        template (`str`): the LLM's own chat template.
        processor ([`BlspKdProcessor`]): renders prompts with the template.
    """
    turn = [{"role": "user", "content": "Hello."}]
    quick = {"enable_thinking": False} if knows(template, "enable_thinking") else {}
    try:
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        is_quick = prompt == processor.apply_chat_template(turn, add_generation_prompt=True, **quick)
    except Exception:  # the template refuses such chats, and says why when it is used
        return
    where = "Answers to speech are trained and given right after the prompt"
    if is_in_thought(prompt):
        logger.warning(
            f"This LLM's chat template opens a thought in every prompt, which ends in {prompt[-40:]!r}. {where}, so "
            "they would land inside the thought. Pass chat_template_kwargs if the template has an option for it (often "
            "{'enable_thinking': False}), or give the LLM's tokenizer a chat template that closes the thought."
        )
    elif not is_quick and "enable_thinking" not in processor.chat_template_kwargs:
        logger.warning(
            "This LLM's chat template has the option 'enable_thinking', which is not set, so the LLM may think "
            f"before it answers. {where}, a thought included. Pass chat_template_kwargs={{'enable_thinking': False}} "
            "for answers without thoughts, or {'enable_thinking': True} to say that thoughts are wanted."
        )
    elif "<|channel|>analysis" in template and not prompt.endswith("<|channel|>final<|message|>"):
        logger.warning(
            "This LLM's chat template writes channels (harmony), and the LLM begins its answers in that of its "
            f"thoughts. {where}. Give the LLM's tokenizer a chat template whose generation prompt ends in "
            "'<|channel|>final<|message|>' for answers without thoughts."
        )
