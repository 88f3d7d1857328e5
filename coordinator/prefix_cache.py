"""Finds pages that already hold the KV of a token prefix.

Owns the map from prefixes to pages. A page is found by the digest of all tokens up to its end, so that equal pages
behind unequal prefixes differ. Digests are 256-bit BLAKE2b: two prefixes with one digest are not to be expected in any
time, even if somebody looks for them, so a hit is taken without comparing tokens.

What else is kept by page may hang on tokens behind it: an EAGLE-3 head's last pair of a page takes the first token of
the next one. With a lookahead, a page's digest covers so many tokens past its end, so that whoever finds it has those
too, and it can only be known once they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


class PrefixCache:
    """Digest of a prefix of full pages -> the page that ends it."""

    __slots__ = ("_key_of_page", "_lookahead", "_page_of_key", "_page_size")

    def __init__(self, page_size: int, lookahead: int = 0) -> None:
        self._page_size = page_size
        self._lookahead = lookahead
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of_key)

    @property
    def page_ids(self) -> Iterable[int]:
        """Pages that can be found."""
        return self._key_of_page.keys()

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], num_pages: int) -> None:
        """Append to `keys`, those of the leading full pages of `tokens`, until there are `num_pages`.

        `tokens` has the lookahead behind the last of them, too.
        """
        size = self._page_size
        for index in range(len(keys), num_pages):
            digest = blake2b(keys[index - 1] if index else b"", digest_size=32)
            digest.update(array("I", tokens[index * size : (index + 1) * size + self._lookahead]).tobytes())
            keys.append(digest.digest())

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages of the longest known prefix."""
        page_ids = []
        for key in keys:
            page_id = self._page_of_key.get(key)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def put(self, key: bytes, page_id: int) -> bool:
        """Make a computed page known; False if another page holds the same prefix already."""
        if key in self._page_of_key:
            return self._page_of_key[key] == page_id
        assert page_id not in self._key_of_page, f"page {page_id} ends two prefixes"
        self._page_of_key[key] = page_id
        self._key_of_page[page_id] = key
        return True

    def forget(self, page_id: int) -> None:
        """Drop a known page, which is about to be overwritten."""
        del self._page_of_key[self._key_of_page.pop(page_id)]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the two maps are inverse to each other."""
        assert {page: key for key, page in self._page_of_key.items()} == self._key_of_page, (
            f"{len(self._page_of_key)} keys and {len(self._key_of_page)} pages do not belong together"
        )
