"""What can go wrong, by kind. Each says whether anything was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._types import Revision


class NkvError(Exception):
    """The base of all errors of this package."""


class InvalidAddress(NkvError, ValueError):
    """The address cannot be understood. Nothing was sent."""


class InvalidKey(NkvError, ValueError):
    """The key or pattern cannot be understood. Nothing was sent."""


class CannotConnect(NkvError, ConnectionError):
    """No server answers at the address, or it refuses the connection. Nothing was changed."""


class Timeout(NkvError, TimeoutError):
    """There was no answer in time. Nothing was changed: a put that had been sent is `OutcomeUnknown` instead."""


class OutcomeUnknown(NkvError):
    """A put or delete was sent, and no answer says what became of it. It may have taken effect, or may do so yet."""


class Conflict(NkvError):
    """The key is at another revision than the condition says. Nothing was changed."""

    def __init__(self, revision: Revision | None, message: str | None = None) -> None:
        where = "absent" if revision is None else f"at revision {revision.number}"
        super().__init__(message or f"the key is {where}")
        #: The key's present revision; `None` if it is absent.
        self.revision = revision


class OtherEpoch(Conflict):
    """The condition names a revision of another life of the data, so it cannot hold. Nothing was changed.

    `revision` is `None`: what the key holds now is to be read anew.
    """

    def __init__(self) -> None:
        super().__init__(None, "the revision is of another epoch than the data of the server")


class Refused(NkvError):
    """The server refused the request. Nothing was changed, unless `status` is 500: then it is not known."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        #: As in HTTP: 400, 401, 403, 413, 429, 500, 503, 507.
        self.status = status


class Closed(NkvError):
    """The client was closed, or this process was forked from the one that made it. Nothing was changed."""


#: What `Closed` says in a child process.
FORKED = "this process was forked from the one that made the client: make another client here"


class ProtocolError(NkvError):
    """The peer does not speak the protocol, or exceeds a limit. The connection is made again."""
