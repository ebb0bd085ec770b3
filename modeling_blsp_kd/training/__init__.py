"""The parts of `BlspKdTrainer` and of `examples/train.py`, and the estimate of what a training costs.

Published models ship none of it. Leaves out: training rows (`processing/training_rows`) and losses (`distillation.py`).
"""
