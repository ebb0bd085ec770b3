"""The paper's comparison: what is trained, how it is run, and what follows from it. See `examples/ablate.py`.

Follows arXiv 2405.19041. Leaves out: training (`train.py`) and evaluation (`evaluate.py`), which run as they are.
"""
