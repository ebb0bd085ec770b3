"""Compare a model on speech with its LLM on text: rows, systems, predictions on disk, scores, tables and plots.

Scores need the extra `metrics`. A published model ships none of it. `examples/evaluate.py` is the command.
"""
