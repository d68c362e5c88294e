"""Errors as clients get them: an HTTP status and the shape that their library knows.

OpenAI: {"error": {"message", "type", "param", "code"}}
(https://platform.openai.com/docs/guides/error-codes); Anthropic:
{"type": "error", "error": {"type", "message"}} (https://docs.anthropic.com/en/api/errors).
"""

from collections.abc import Mapping
from typing import Any

from chalot.engine.requests import OutOfPages, QueueFull
from chalot.errors import ChalotError, ContextError, FormatError, KernelError, LimitError

TYPES = {  # status -> OpenAI's type and Anthropic's
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}


class Fault(ChalotError):
    """What a client gets instead of an answer."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """Beside the usual ones."""
        out = {}
        if self.retry_after is not None:
            out["retry-after"] = str(self.retry_after)
        if self.status == 401:
            out["www-authenticate"] = "Bearer"
        return out

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON document, in the shape of the API that `path` belongs to."""
        openai, anthropic = TYPES.get(self.status, TYPES[500])
        if path.startswith("/v1/messages"):
            return {"type": "error", "error": {"type": anthropic, "message": self.message}}
        about = {"message": self.message, "type": openai, "param": self.param, "code": self.code}
        return {"error": about}


def fault_of(error: BaseException) -> Fault:
    """Any error as a fault; what is not a ChalotError says nothing of the inside."""
    if isinstance(error, Fault):
        return error
    message = " ".join(str(error).split())[:1000]
    if isinstance(error, QueueFull):
        return Fault(message, 429, code="queue_full", retry_after=1)
    if isinstance(error, OutOfPages):
        return Fault(message, code="out_of_pages")
    if isinstance(error, ContextError):
        return Fault(message, code="context_length_exceeded")
    if isinstance(error, LimitError):
        return Fault(message, 503, code="out_of_memory", retry_after=1)
    if isinstance(error, (KernelError, FormatError)):  # of the model's file or the machine
        return Fault(message, 500, code="internal_error")
    if isinstance(error, ChalotError):
        return Fault(message)
    return Fault("the server failed; its log has the kind of error", 500, code="internal_error")
