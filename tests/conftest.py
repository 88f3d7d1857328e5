from __future__ import annotations

from one_authority import believe_one

believe_one()  # before a client is made
