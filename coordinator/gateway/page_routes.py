"""The chat page at `/`: files of the folder `page`, held in memory, with a policy under which it loads nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Nothing from elsewhere, nothing inline: text of a model that looked like a script could not run.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked again each time, and answered with 304 while nothing has changed
}


def add_page_routes(app: FastAPI) -> None:
    """Serve the page and its files; there is no route to any other file."""
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            _add_file(app, "/" if path.name == "index.html" else f"/page/{path.name}", path)
    _add_file(app, "/favicon.ico", _FOLDER / "icon.svg")  # asked for by browsers that are shown a route's JSON


def _add_file(app: FastAPI, route: str, path: Path) -> None:
    body = path.read_bytes()
    headers = {**_HEADERS, "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    media_type = _TYPES[path.suffix] + "; charset=utf-8"

    @app.get(route, include_in_schema=False)
    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)
