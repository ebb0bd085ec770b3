"""Realtime: a client streams audio over a WebSocket, and the answer is streamed back as text.

Follows OpenAI's realtime protocol, its events of audio in and text out. `sessions.py` takes connections, `session.py`
answers events. Leaves out: spoken answers, tools, and images.
"""
