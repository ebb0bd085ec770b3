"""Publishing a trained model as a repository of the Hub; `examples/publish.py` goes through it step by step.

`handler.py`, `requirements.txt` and the text of `card_template.md` become part of what is published; the other files do
the publishing. Leaves out: the model and its code, which save themselves.
"""
