"""The cost of the parts beside their peers and the machine's limit: `python -m tests.benchmarks`.

One file per part, each with a function `cases(small, device, dtype)`. Leaves out: whether results are right, see the
tests.
"""
