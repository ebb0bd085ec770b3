"""The parts of `make_training_data.py`: where rows come from, what is asked, who answers, and how nothing is lost.

Follows arXiv 2405.19041: the LLM's own answers to prompts over transcripts are what it learns to give after speech.
Leaves out: training itself.
"""
