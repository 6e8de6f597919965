"""Prefect's server with transactions that SQLite cannot refuse: `python -m flows.database` is `prefect server start`.

Prefect begins most transactions DEFERRED. One that has read and then wants to write, after another one wrote, is
refused at once with "database is locked" (SQLITE_BUSY_SNAPSHOT), whatever its 60 s of patience: what it has read is
out of date. Clients try such requests again; the server's own services do not, and an event or a worker's heartbeat is
lost. Begun IMMEDIATE, a transaction waits for the write lock before it reads, and is never refused so. No setting says
that, so the server gets a database configuration of ours. PostgreSQL is left as it is.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.cli import app
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import set_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
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


def main() -> None:
    """Start the server and stay until it is told to end."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if get_dialect(url).name == "sqlite":
        set_database_config(Immediate(connection_url=url))
    sys.argv[:] = ["prefect", "server", "start"]
    app()


if __name__ == "__main__":
    main()
