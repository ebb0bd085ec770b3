"""Training rows: mixtures, streams, augmentation, bad clips.

Follows transformers' Trainer (its way of resuming) and `datasets` (mixtures, shuffling). Published models do not ship
it. Leaves out: reading manifests (`processing/manifests.py`), making rows (`processing/response_generation`), and the
order of batches (`modeling_blsp_kd/training/batch_order.py`).
"""
