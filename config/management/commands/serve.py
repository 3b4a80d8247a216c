"""``manage.py serve``: the production server."""

import sys
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, connections

from config import shared_metrics
from config.connection import Limits
from config.env import refuse_wrong_settings
from config.schema_version import newer_problem, older_problem
from config.server import Config, Server, bind
from config.workers import Workers
from providers import keyring
from providers.hardening import harden_process


class Command(BaseCommand):
    """Serve both planes on one address until SIGTERM or SIGINT, then drain."""

    help = "Serve the gateway and the admin (HOST, PORT, WEB_CONCURRENCY and TRUSTED_PROXIES say how)."

    requires_system_checks: Any = []  # `_refuse` says the same in one line

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default=settings.HOST, help="address to listen on, instead of HOST")
        parser.add_argument(
            "--port", type=int, default=settings.PORT, help="port to listen on, instead of PORT"
        )
        parser.add_argument(
            "--grace",
            type=float,
            default=Limits().grace_seconds,
            help="seconds to go on accepting after the signal to stop, until balancers have noticed",
        )

    def handle(self, *args: object, host: str, port: int, grace: float, **options: object) -> None:
        """Bind, then run one server here or several in workers."""
        if settings.WEB_CONCURRENCY > 1:
            shared_metrics.share()
        harden_process()
        _refuse()
        sock = bind(host, port)
        from config.asgi import application
        from proxy.inflight import REGISTRY

        config = Config(
            application, limits=Limits(grace_seconds=grace), trusted_proxies=settings.TRUSTED_PROXIES
        )

        def work() -> None:
            Server(config, drain=REGISTRY).run(sockets=[sock])

        _close_connections()
        count: int = settings.WEB_CONCURRENCY
        if count == 1:
            work()
        else:
            workers = Workers(work, count=count, sock=sock, ended=shared_metrics.forget)
            try:
                sys.exit(workers.run())
            finally:
                shared_metrics.clear()


def _refuse() -> None:
    """End here, before anything listens, when a setting or the encryption key is wrong, or the tables are not ours."""
    refuse_wrong_settings(list(settings.SETTINGS_PROBLEMS))
    try:
        keyring.load()
        if problem := newer_problem() or older_problem():
            raise CommandError(problem)
    except keyring.WrongEncryptionKey as error:
        raise CommandError(str(error)) from None
    except DatabaseError as error:
        raise CommandError(f"DATABASE_URL: the database cannot be read ({type(error).__name__})") from None


def _close_connections() -> None:
    """A forked worker must share neither a connection nor a pool, whose threads stay behind, with its parent."""
    for connection in connections.all(initialized_only=True):
        connection.close()
        if hasattr(connection, "close_pool"):
            connection.close_pool()
