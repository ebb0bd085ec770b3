"""Take WebSockets, as many as may be open, and run a session in each.

Leaves out: keys (`middleware.py`), and what a session does (`session.py`).
"""

import time
from concurrent.futures import ThreadPoolExecutor

from starlette.websockets import WebSocket

from ..errors import BadRequest, Busy, ServingError
from ..front import Front
from .connection import Connection
from .session import Session


class Realtime:
    """The sessions of one front. All encode their chunks in one thread, in turns.

    Args:
        front ([`Front`]).
    """

    def __init__(self, front: Front):
        self.front, self.num_sessions = front, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="realtime")

    async def serve(self, socket: WebSocket):
        """Run a session; if that cannot be, the client gets the error as an HTTP response."""
        settings, begin = self.front.settings, time.monotonic()
        connection = Connection(socket, settings.session_idle_s, settings.max_session_s)
        try:
            self.front.check_model(socket.query_params.get("model"))
            if self.num_sessions >= settings.max_sessions:
                raise Busy(f"{self.num_sessions} realtime sessions are open, as many as may be.")
            try:
                session = Session(self.front, connection.send, self._thread)
            except ValueError as error:  # the model reads whole clips
                raise BadRequest(str(error)) from error
        except ServingError as error:
            await socket.send_denial_response(error.response())
            return
        self._hold(1)
        try:
            await connection.run(session)
        finally:
            session.stop()
            self._hold(-1)
            self.front.metrics.session_s.observe(time.monotonic() - begin)

    def close(self):
        """End the thread that encodes."""
        self._thread.shutdown()

    def _hold(self, num_sessions: int):
        self.num_sessions += num_sessions
        self.front.metrics.sessions.set(self.num_sessions)
