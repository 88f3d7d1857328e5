"""Reads what a server says of speculation: its counters before and after a point."""

from __future__ import annotations

import ssl

import httpx

from tpserve.coordinator.draft_counts import Drafts, parse_drafts

_TIMEOUT_S = 10.0


async def read_drafts(
    base_url: str,
    api_key: str | None,
    transport: httpx.AsyncBaseTransport | None = None,
    verify: ssl.SSLContext | None = None,
) -> Drafts | None:
    """Return an endpoint's counters; None if it has none, as not every server speculates or shows metrics."""
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(
            trust_env=False,
            verify=verify or httpx.create_ssl_context(),
            timeout=_TIMEOUT_S,
            headers=headers,
            transport=transport,
        ) as http:
            reply = await http.get(url)
            reply.raise_for_status()
            return parse_drafts(reply.text)
    except (httpx.HTTPError, ValueError):
        return None
