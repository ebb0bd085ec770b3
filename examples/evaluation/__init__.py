"""What `examples/evaluate.py` is made of: rows, systems, predictions on disk, scores, tables and plots."""
