"""A closed world of some 130 spoken words, with a tiny LLM and a tiny speech encoder that know it.

Follows no paper: it stands in for a real LLM, a real Whisper and a real corpus, so that `train.py` runs on a laptop.
Leaves out: everything that takes more than minutes. For real use, replace its two backbones and its rows.
"""
