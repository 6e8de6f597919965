"""Prefect's server with transactions that SQLite cannot refuse and pages that keep to it: `python -m flows.database` is
`prefect server start`.

Prefect's pages load an analytics library that asks its maker's server for a configuration, whatever the settings say;
a header tells browsers that the pages may talk to this server alone.

Prefect begins most transactions DEFERRED. One that has read and then wants to write, after another one wrote, is
refused at once with "database is locked" (SQLITE_BUSY_SNAPSHOT), whatever its 60 s of patience: what it has read is
out of date. Clients try such requests again; the server's own services do not, and an event or a worker's heartbeat is
lost. Begun IMMEDIATE, a transaction waits for the write lock before it reads, and is never refused so. No setting says
that, so the server gets a database configuration of ours. PostgreSQL is left as it is.
"""

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from prefect.cli import app
from prefect.server.api import server
from prefect.server.api.server import create_ui_app
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_UI_API_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class Immediate(AioSqliteConfiguration):
    """SQLite as Prefect sets it up, but for how a transaction begins."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """A transaction that holds the write lock from its start."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            await session.connection()  # begins it
            # Sessions that are opened meanwhile, to read, would wait for this one's lock, and it for them.
            token = SQLITE_BEGIN_MODE.set(None)
            try:
                yield transaction
            finally:
                SQLITE_BEGIN_MODE.reset(token)


def pages(ephemeral: bool) -> FastAPI:
    """Prefect's pages, from which a browser connects to this server alone, or to the API that they are told to use."""
    app = create_ui_app(ephemeral)
    api = urlsplit(str(PREFECT_UI_API_URL.value()))
    policy = " ".join(["connect-src 'self'", *([f"{api.scheme}://{api.netloc}"] if api.netloc else [])])

    @app.middleware("http")
    async def confined(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers["Content-Security-Policy"] = policy
        return response

    return app


def main() -> None:
    """Start the server and stay until it is told to end."""
    server.create_ui_app = pages
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if get_dialect(url).name == "sqlite":
        set_database_config(Immediate(connection_url=url))
    sys.argv[:] = ["prefect", "server", "start"]
    app()


if __name__ == "__main__":
    main()
