"""``manage.py serve``: the production server."""

import sys
from argparse import ArgumentParser

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import connections

from config.connection import Limits
from config.server import Config, Server, bind, harden_process
from config.workers import Workers


class Command(BaseCommand):
    """Serve both planes on one address until SIGTERM or SIGINT, then drain."""

    help = "Serve the gateway and the admin (HOST, PORT, WEB_CONCURRENCY and TRUSTED_PROXIES say how)."

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
        harden_process()
        sock = bind(host, port)
        from config.asgi import application
        from proxy.inflight import REGISTRY

        config = Config(
            application, limits=Limits(grace_seconds=grace), trusted_proxies=settings.TRUSTED_PROXIES
        )

        def work() -> None:
            Server(config, drain=REGISTRY).run(sockets=[sock])

        connections.close_all()  # A forked worker must not share a connection that a system check opened.
        count: int = settings.WEB_CONCURRENCY
        if count == 1:
            work()
        else:
            sys.exit(Workers(work, count=count, sock=sock).run())
