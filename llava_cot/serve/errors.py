"""What a client is told when its request is refused."""

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from llava_cot_kernels.page_pool import OutOfPages

log = logging.getLogger(__name__)

RETRY = {"Retry-After": "2"}  # seconds, where it is not the request's fault
CLOSE = {"Connection": "close"}  # where a body may be left unread
MAX_MESSAGE = 1000  # characters
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Whose errors of value say what is wrong with a request: these modules check prompts
ABOUT_REQUESTS = (
    "llava_cot.prompt",
    "llava_cot.question",
    "llava_cot.image",
    "llava_cot.engine.schedule",
    "llava_cot.engine.session",
    "llava_cot.core",
)


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


def as_request_error(error: Exception, field: str) -> RequestError:
    """Return what a client is told of an error. Texts of other libraries are not passed on.

    Args:
        field: that of the request which has the conversation.
    """
    frames = [*traceback.walk_tb(error.__traceback__)]
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    if isinstance(error, ValueError) and module in ABOUT_REQUESTS:
        return RequestError(400, str(error).replace("question", field, 1), field)
    if isinstance(error, OutOfPages):
        return RequestError(
            400, "the request needs more KV cache than this server has", field, "context_length_exceeded"
        )
    log.error("a search failed", exc_info=error)
    return RequestError(500, "the search failed; the server's log says why", None, "search_failed")
