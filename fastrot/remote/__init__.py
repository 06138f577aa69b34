"""Files elsewhere: what lies at an address, and its bytes, each checked to be what was asked for.

`store.py`: what every store gives; `anywhere.py`: s3, gs, a shared disk, all that fsspec knows; `web.py`: http and
https; `address.py`: a source's files.
"""

from fastrot.remote.address import Found, absolute, addresses, is_remote, locate, open_store
from fastrot.remote.store import Entry, Piece, Store, shown

__all__ = ["Entry", "Found", "Piece", "Store", "absolute", "addresses", "is_remote", "locate", "open_store", "shown"]
