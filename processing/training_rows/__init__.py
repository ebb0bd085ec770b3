"""What is trained on: mixtures, streams, augmentation, bad clips.

Follows transformers' Trainer (its way of resuming) and `datasets` (mixtures, shuffling). Published models do not ship
it. Leaves out: the order of batches (`modeling_blsp_kd/training/batch_order.py`) and making rows.
"""
