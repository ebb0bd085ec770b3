"""Serving behind vLLM: what the engine needs of a model, and a plugin for partial LoRA."""
