"""A client of nkv, a notify key-value store: values under dotted keys, and news of each change.

`Client` blocks and may be used by any thread. `nkv.aio.Client` is for asyncio.
"""

from ._errors import (
    CannotConnect,
    Closed,
    Conflict,
    InvalidAddress,
    InvalidKey,
    NkvError,
    OtherEpoch,
    OutcomeUnknown,
    ProtocolError,
    Refused,
    Timeout,
)
from ._plain import BranchWatch, Client, Pipeline, Subscription, Watch
from ._types import Entry, Event, Gone, GoneReason, Listed, Page, Revision, Stats, Synced, Update

__version__ = "0.1.0"

__all__ = [
    "BranchWatch", "CannotConnect", "Client", "Closed", "Conflict", "Entry", "Event", "Gone", "GoneReason", "InvalidAddress",
    "InvalidKey", "Listed", "NkvError", "OtherEpoch", "OutcomeUnknown", "Page", "Pipeline", "ProtocolError", "Refused",
    "Revision", "Stats", "Subscription", "Synced", "Timeout", "Update", "Watch", "__version__",
]
