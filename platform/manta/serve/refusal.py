"""What a client did wrong, in the form of OpenAI's errors."""

from typing import Any


class Refusal(Exception):
    """A request that is not answered, with a message for whoever wrote it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        """Args:
        param: the field of the request that is wrong.
        status: the status of HTTP.
        code: one of the codes that clients know.
        """
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.kind = kind

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}
