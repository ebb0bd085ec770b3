"""What `publish.py` puts into a Hub repository beside the model, and how it is written, checked and uploaded.

`handler.py` and `requirements.txt` are published as they are; the other files do the publishing. Leaves out: the model
and its code, which save themselves.
"""
