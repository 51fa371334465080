"""What a client is told when its request is refused."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY = {"Retry-After": "2"}  # seconds, where it is not the request's fault
MAX_MESSAGE = 1000  # characters
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is refused. The body of its response is that of OpenAI's API.

    Args:
        status: HTTP status, 4xx or 5xx.
        message: fixed words and what the client itself sent. It never has a library's error text, a path or an address.
        param: the field of the request that is wrong, such as "messages[0].content[1].image_url.url".
        code: a short name of the reason that a program can compare.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if len(message) > MAX_MESSAGE:  # what the client sent may be long
            message = f"{message[:MAX_MESSAGE]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response, which is an ASGI app too."""
        return JSONResponse(self.body, self.status, self.headers)
