"""Serving: a front that encodes speech, and an engine behind it that runs the unchanged LLM.

`python -m processing.serving MODEL --engine http://host:port/v1` speaks OpenAI's protocol. It encodes audio itself and
sends the engine (vLLM) each clip as a `prompt_embeds` part of the chat. `engine_files.py` and `vllm_plugin` are for the
engine. Published models do not ship this package. Leaves out: generation, chat templates, tools and structured output,
which are the engine's.
"""
