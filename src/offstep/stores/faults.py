"""What a store's refusal means: whether it may pass, and what to say of it without repeating a secret."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

_STATUS = re.compile(r"([A-Z_]{4,}): (?:(?P<code>[A-Za-z]{3,60}):)?")
_HTTP_CODE = re.compile(r"\[http_response_code='(\d{3})'\]")
_CURL_TEXT = re.compile(r"CURL error ([A-Za-z' ]{3,80})")

_FINAL = {
    "PERMISSION_DENIED": (errno.EACCES, "the store refuses access; check the credentials in the environment"),
    "UNAUTHENTICATED": (errno.EACCES, "the store does not accept the credentials in the environment"),
    "NOT_FOUND": (errno.ENOENT, "the store knows no such bucket"),
    "INVALID_ARGUMENT": (errno.EINVAL, "the store does not understand the request"),
    "FAILED_PRECONDITION": (errno.EINVAL, "the store cannot be used as it is addressed"),
    "UNIMPLEMENTED": (errno.EOPNOTSUPP, "the store cannot do this"),
    "OUT_OF_RANGE": (errno.EIO, "the object is shorter than expected"),
    "DATA_LOSS": (errno.EIO, "the store lost data"),
}


@dataclass(frozen=True)
class Fault:
    """Why a request failed.

    Attributes:
        errno: The system's number for it.
        text: For people; holds no part of a request or an answer but status codes.
        may_pass: Whether the same request may succeed later.
        is_range: Whether the object is shorter than the range that was asked for.
    """

    errno: int
    text: str
    may_pass: bool
    is_range: bool = False


def describe_fault(error: Exception) -> Fault:
    """Reads an exception of TensorStore."""
    message = str(error)
    status = _STATUS.match(message)
    name = "OUT_OF_RANGE" if isinstance(error, IndexError) else status[1] if status else type(error).__name__
    details = _find_details(message)
    if name in _FINAL:
        number, text = _FINAL[name]
        is_range = name == "OUT_OF_RANGE"
        return Fault(number, f"{text} ({', '.join([name, *details])})", may_pass=False, is_range=is_range)
    return Fault(errno.EIO, f"the store does not answer as it should ({', '.join([name, *details])})", may_pass=True)


def _find_details(message: str) -> list[str]:
    # Bodies of answers may repeat the key and what was signed: only codes are taken from them.
    http, curl, status = _HTTP_CODE.search(message), _CURL_TEXT.search(message), _STATUS.match(message)
    details = [f"HTTP {http[1]}"] if http else []
    details += [status["code"]] if http and status and status["code"] else []
    return details + ([curl[1].strip()] if curl else [])
