"""Tokens and errors of huggingface_hub: the one place that knows what its exceptions mean for a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loraweld.errors import LoraweldError, RequestError

_SHOWN = 400


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises: errors of the Hub, of the connection, and of the files it reads and writes."""
    from huggingface_hub.errors import HfHubHTTPError

    # HTTPError is of httpx or requests, as it may be. RuntimeError and ValueError: an object that was not taken.
    return (HfHubHTTPError, *HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)


@contextmanager
def explained(what: str, kind: type[LoraweldError], *, token: object = None) -> Iterator[None]:
    """Turn what the client raises into one message of `kind` that begins with `what`; a token is never in it."""
    try:
        yield
    except LoraweldError:
        raise
    except client_errors() as error:
        raise kind(f"{what}: {hidden(_meaning(error), token)}") from None


def hidden(text: str, token: object) -> str:
    """Return a text without the token."""
    return text.replace(token, "hf_…") if isinstance(token, str) and token else text


def _meaning(error: Exception) -> str:
    """What happened, and what to do about it."""
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return "the Hub's client is offline; unset HF_HUB_OFFLINE"
        case errors.GatedRepoError():
            return (
                "it is gated: accept its conditions on its page of the Hub, then log in (hf auth login) or give a "
                "token of the account that has access"
            )
        case errors.RevisionNotFoundError():
            return "it has no such revision; branches, tags and commits are listed on its page of the Hub"
        case errors.RepositoryNotFoundError():
            return (
                "the Hub has no such repository, or it is private; check the name, log in (hf auth login) or give a "
                "token that may read it"
            )
        case errors.EntryNotFoundError():
            return f"a file is missing: {_lines(error)}"
        case errors.HfHubHTTPError():
            return _status(error)
        case RuntimeError() if error.__cause__ is not None:
            return f"{_lines(error)} {_meaning(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
        case _:
            return f"{type(error).__name__}: {_lines(error)[:200]}"


def _status(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    meant = {
        401: "the Hub does not take the token; log in again (hf auth login) or give another",
        403: "the token may not do this; give one with write permission for this repository",
        412: "somebody else has committed meanwhile",
        429: "the Hub asks for fewer requests; wait a while and give the same command again",
    }
    advice = meant.get(status or 0, "")
    if _is_5xx(status):
        advice = "the Hub has a problem; give the same command again later"
    return f"{advice} ({_lines(error)})" if advice else _lines(error)


def _is_5xx(status: object) -> bool:
    return isinstance(status, int) and 500 <= status < 600


def _lines(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines if line.strip())[:_SHOWN]


def resolve_token(token: str | bool | None) -> str:
    """Return the token to write with: the one given, or the stored login.

    Raises:
        RequestError: there is none.
    """
    if isinstance(token, str):
        return token
    if token is False:
        raise RequestError("token is False, and nothing is uploaded without one; give a token, True or None")
    from huggingface_hub import get_token

    stored = get_token()
    if stored is None:
        raise RequestError(f"token is {token!r}, and there is no stored login; give a token, or run hf auth login")
    return stored
