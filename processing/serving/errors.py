"""The errors of the front, and the form in which OpenAI's protocol tells them."""

import json
import math

from starlette.responses import JSONResponse, Response


class ServingError(Exception):
    """An error that a client is told.

    Args:
        message (`str`).
        param (`str`, *optional*): the field of the request that is wrong.
    """

    status, kind = 500, "server_error"

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def response(self) -> Response:
        """Return the response to a request that failed before its answer began."""
        return JSONResponse(error_body(self), self.status, self._headers())

    def _headers(self) -> dict[str, str]:
        return {}


class BadRequest(ServingError):
    status, kind = 400, "invalid_request_error"


class Unauthorized(ServingError):
    status, kind = 401, "authentication_error"

    def _headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ServingError):
    status, kind = 404, "not_found_error"


class TooLarge(ServingError):
    status, kind = 413, "invalid_request_error"


class ServerError(ServingError):
    """Something is wrong here, and not with the request."""


class EngineUnreachable(ServingError):
    status, kind = 502, "engine_error"


class TimedOut(ServingError):
    status, kind = 504, "timeout_error"


class Busy(ServingError):
    """There is no room to wait in. Retry after `retry_after_s`."""

    status, kind = 429, "rate_limit_error"

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(f"{message} Try again later.")
        self.retry_after_s = retry_after_s

    def _headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class EngineRefused(ServingError):
    """The engine refuses a client's request: its own response, which passes unchanged."""

    def __init__(self, status: int, contents: bytes):
        super().__init__(contents.decode(errors="replace"))
        self.status, self.contents = status, contents

    def response(self) -> Response:
        return Response(self.contents, self.status, media_type="application/json")


def error_body(error: ServingError) -> dict:
    """Return the JSON of an error."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}}


def error_event(error: ServingError) -> bytes:
    """Return an error as the last event of a stream."""
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"
