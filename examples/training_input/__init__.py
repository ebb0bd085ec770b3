"""What `train.py` trains on: manifests, mixtures, streams, augmentation, bad clips.

Follows transformers' Trainer (its batches, its way of resuming) and `datasets` (mixtures, shuffling). Leaves out:
making rows (`make_training_data.py`) and tensors of them (`processing/data_collator.py`).
"""
