"""The other gateways that `make bench-peers` measures where they are installed: a line each, with its configuration file."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.servers import UPSTREAM_KEY, Server, start
from tests.support.ports import free_port
from tests.support.processes import StartFailed

START_TIMEOUT = 120.0
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))

NGINX = """
worker_processes 1;
daemon off;
pid @FOLDER@/pid;
events { worker_connections 8192; }
http {
  access_log off;
  client_max_body_size 16m;
  client_body_buffer_size 256k;
  client_body_temp_path @FOLDER@/body;
  proxy_temp_path @FOLDER@/proxy;
  fastcgi_temp_path @FOLDER@/fastcgi;
  uwsgi_temp_path @FOLDER@/uwsgi;
  scgi_temp_path @FOLDER@/scgi;
  keepalive_requests 1000000;
  upstream bench { server @UPSTREAM_HOST@; keepalive 512; keepalive_requests 1000000; }
  server {
    listen 127.0.0.1:@PORT@;
    location / {
      proxy_pass http://bench;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }
  }
}
"""

LITELLM = """
model_list:
  - {model_name: plain, litellm_params: {model: openai/plain, api_base: "@UPSTREAM@/v1", api_key: @UPSTREAM_KEY@}}
  - {model_name: stream, litellm_params: {model: openai/stream, api_base: "@UPSTREAM@/v1", api_key: @UPSTREAM_KEY@}}
  - {model_name: paced, litellm_params: {model: openai/paced, api_base: "@UPSTREAM@/v1", api_key: @UPSTREAM_KEY@}}
litellm_settings: {set_verbose: false, num_retries: 0, telemetry: false}
general_settings: {master_key: sk-bench-0123456789, disable_spend_logs: true}
"""

# It has no option for the address to listen on, and takes all of them. Nobody else is to reach it.
PORTKEY = """
const { Server } = require("node:net");
const listen = Server.prototype.listen;
Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, port, "127.0.0.1", ...rest.filter((each) => typeof each === "function"));
};
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway to compare with.

    variable: names its program in the environment. program: else what is looked for on PATH. config, file: its configuration and
    the file that this goes to. args, env, headers, config: @PORT@, @UPSTREAM@, @UPSTREAM_HOST@, @UPSTREAM_KEY@, @FOLDER@ and
    @CONFIG@ (that file) are filled in. share: see `Server`.
    """

    name: str
    variable: str
    program: str
    install: str
    file: str
    config: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    key: str = "none"
    share: int = 1

    def found(self) -> str:
        """The path of its program; empty when it is not installed."""
        return os.environ.get(self.variable) or shutil.which(self.program, path=SEARCHED) or ""


PEERS = (
    Peer(
        name="nginx",
        variable="BENCH_NGINX",
        program="nginx",
        install="apt-get install nginx-light",
        file="nginx.conf",
        config=NGINX,
        args=("-e", "stderr", "-p", "@FOLDER@", "-c", "@CONFIG@"),
    ),
    Peer(
        name="litellm",
        variable="BENCH_LITELLM",
        program="litellm",
        install="python3 -m venv FOLDER && FOLDER/bin/pip install 'litellm[proxy]', then BENCH_LITELLM=FOLDER/bin/litellm",
        file="config.yaml",
        config=LITELLM,
        args=("--config", "@CONFIG@", "--host", "127.0.0.1", "--port", "@PORT@", "--num_workers", "1"),
        env={
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_DOCS": "True",
        },
        key="sk-bench-0123456789",
        share=10,
    ),
    Peer(
        name="portkey",
        variable="BENCH_PORTKEY",
        program="portkey-gateway",
        install="npm install --prefix FOLDER @portkey-ai/gateway, then BENCH_PORTKEY=FOLDER/node_modules/.bin/gateway (docs/benchmarks.md)",
        file="loopback.cjs",
        config=PORTKEY,
        args=("--port=@PORT@", "--headless"),
        env={"NODE_ENV": "production", "NODE_OPTIONS": "--require @CONFIG@"},
        headers={"x-portkey-provider": "openai", "x-portkey-custom-host": "@UPSTREAM@/v1"},
        key=UPSTREAM_KEY,
        share=2,
    ),
)


def installed(stack: contextlib.ExitStack, upstream: str) -> list[Server]:
    """Start the peers that are there; a line for each that is not, or that does not start."""
    servers = []
    for peer in PEERS:
        program = peer.found()
        if not program:
            print(f"{peer.name} is not installed (${peer.variable} says where): {peer.install}")
            continue
        try:
            servers.append(_started(stack, peer, program, upstream))
        except (OSError, StartFailed) as error:
            print(f"{peer.name} did not start: {str(error)[-600:]}")
    return servers


def _started(stack: contextlib.ExitStack, peer: Peer, program: str, upstream: str) -> Server:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"penstock-bench-{peer.name}-")))
    port = free_port()
    config = folder / peer.file
    words = {
        "@PORT@": str(port),
        "@UPSTREAM@": upstream,
        "@UPSTREAM_HOST@": urlsplit(upstream).netloc,
        "@UPSTREAM_KEY@": UPSTREAM_KEY,
        "@FOLDER@": str(folder),
        "@CONFIG@": str(config),
    }
    config.write_text(_filled(peer.config, words))
    command = [program, *(_filled(arg, words) for arg in peer.args)]
    # Nothing of our environment: a peer has no business with what is in it.
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "TMPDIR": str(folder)}
    env |= {name: _filled(value, words) for name, value in peer.env.items()}
    process = start(stack, command, peer.name, port, env, START_TIMEOUT)
    headers = {name: _filled(value, words) for name, value in peer.headers.items()}
    return Server(peer.name, port, peer.key, process, headers=headers, share=peer.share)


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
