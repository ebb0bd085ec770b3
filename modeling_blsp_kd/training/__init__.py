"""What trains a BLSP-KD model beyond `BlspKdTrainer`, and what a training costs.

A published model ships none of it. `examples/train.py` and `examples/estimate.py` are the commands.
"""
