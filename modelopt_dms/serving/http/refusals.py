# SPDX-License-Identifier: Apache-2.0
"""Every error in the one form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteError

from modelopt_dms.kernels.layout import OutOfPagesError

# What OpenAI's server says of a status where it says more than the kind.
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 507: "kv_cache_full"}


class Refusal(HTTPException):
    """A request that is not answered, and the field that is why."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        """Take what `error_body` shows."""
        super().__init__(status, message)
        self.param, self.code = param, code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's server writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = code or _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_errors(app: FastAPI) -> None:
    """Have an application answer every error in that form."""

    def answer(status: int, message: str, error: Any = None) -> JSONResponse:
        about = (getattr(error, "param", None), getattr(error, "code", None))
        return JSONResponse(error_body(status, message, *about), status)

    @app.exception_handler(StarletteError)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, f"the body must be a JSON object: {_why(error)}")

    @app.exception_handler(ValueError)
    async def impossible(request: Request, error: ValueError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(TemplateError)
    async def not_rendered(request: Request, error: TemplateError) -> JSONResponse:
        return answer(400, f"the model's chat template refuses these messages: {error}")

    @app.exception_handler(OutOfPagesError)
    async def full(request: Request, error: OutOfPagesError) -> JSONResponse:
        return answer(507, str(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"{type(error).__name__}: {error}")


def _why(error: RequestValidationError) -> str:
    """What is wrong with a body, in words."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"{first['ctx']['error']} at character {first['loc'][-1]}"
    if first["type"] == "missing":
        return "it is empty"
    return f"got {first['input']!r:.60} (Content-Type must be application/json)"
