"""A request body that is refused when it is too large or comes too slowly."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive

from tpserve.coordinator.gateway.errors import BodyTooLarge, BodyTooSlow

BYTES_PER_S = 16 * 1024
"""A body that comes slower than this for long is given up."""


def limited_body(headers: dict[bytes, bytes], receive: Receive, *, max_bytes: int, timeout_s: float) -> Receive:
    """Return a channel that holds a body to its limits, by its declared length or as it comes in.

    Parameters
    ----------
    timeout_s
        The body must be there after this time, and a second more for each `BYTES_PER_S` of it.

    Raises
    ------
    BodyTooLarge
        Here, or from the channel.
    BodyTooSlow
        From the channel.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise BodyTooLarge(f"The body has {declared[:20].decode()} bytes and may have {max_bytes}")
    num_bytes = 0
    is_whole = False
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def limited() -> Message:
        nonlocal num_bytes, is_whole
        if is_whole:  # from here on it tells when the client leaves
            return await receive()
        try:
            async with asyncio.timeout_at(begin + timeout_s + num_bytes / BYTES_PER_S):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow(
                f"After {loop.time() - begin:.0f} s only {num_bytes} bytes of the body had come: it must come within "
                f"{timeout_s:g} s and a second for each {BYTES_PER_S} bytes"
            ) from None
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise BodyTooLarge(f"The body has more than {max_bytes} bytes, which is the limit")
        is_whole = not message.get("more_body", False)
        return message

    return limited
