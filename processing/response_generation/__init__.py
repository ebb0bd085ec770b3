"""Training rows from ASR data: the LLM answers prompts about transcripts, and its answers become the responses.

Follows arXiv 2405.19041: after speech, the model learns to give the LLM's own answers to the transcript. A published
model ships none of it. `examples/make_training_data.py` is the command.
"""

from .generation import Generated, generate_responses
from .options import AnswerOptions, RowOptions, SourceOptions

__all__ = ["AnswerOptions", "Generated", "RowOptions", "SourceOptions", "generate_responses"]
