"""The token that lets this user's commands into a Ray cluster, and nobody else's."""

import stat
from pathlib import Path

from manta.errors import ClusterError

AUTH_HINT = (
    "Ray's cluster asks for a token: run `export RAY_AUTH_MODE=token` in this shell (and copy the "
    "cluster's ~/.ray/auth_token here when it runs on another machine), then try again"
)
TOKEN_FILE = Path("~/.ray/auth_token")


def protect_token() -> None:
    """Makes the file of Ray's token readable by its owner alone: Ray can write it with mode 0644.

    Raises:
        ClusterError: others can read the file, and its mode cannot be changed.
    """
    file = TOKEN_FILE.expanduser()
    if not file.is_file() or not stat.S_IMODE(file.stat().st_mode) & 0o077:
        return
    try:
        file.chmod(0o600)
    except OSError:
        raise ClusterError(
            f"others can read {file}, the token that lets them run code as you; run "
            f"`chmod 600 {file}`"
        ) from None


def is_refusal(error: BaseException) -> bool:
    """Whether an error from Ray means that our token is missing or wrong."""
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("unauthorized", "unauthenticated", "auth_token", "401"))
