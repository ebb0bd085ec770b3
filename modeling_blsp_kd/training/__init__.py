"""What `BlspKdTrainer` and `examples/train.py` are made of, and what a training costs.

Published models ship none of it. Leaves out: training rows (`processing/training_rows`) and losses (`distillation.py`).
"""
