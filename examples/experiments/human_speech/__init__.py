"""Strings of spoken digits by human speakers: their text, an LLM for it, and what goes wrong on an unseen speaker."""
