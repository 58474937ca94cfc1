"""What went wrong, as the clients of OpenAI are told it."""

import torch
from fastapi import HTTPException


class ContextLengthExceeded(ValueError):
    """A prompt longer than the model reads, or than the server has room for; clients know it by its code."""


class Refused(HTTPException):
    """The answer to what is wrong with a request: status 400 and its sentence."""

    def __init__(self, error: Exception):
        super().__init__(400, str(error))
        self.code = "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else self.status_code


def error_body(error: HTTPException) -> dict:
    """An error as the OpenAI API writes it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
    code = getattr(error, "code", error.status_code)
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": code}}


def has_lost_device(error: Exception) -> bool:
    """
    Whether an error leaves the process without its device, as a device-side assertion does on CUDA: all that is asked
    of the device later fails, too. Memory that was not to be had is no such error.
    """
    told = str(error)
    lost = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in told
    return lost and "out of memory" not in told and "ALLOC_FAILED" not in told
