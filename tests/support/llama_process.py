"""The process in which the llama.cpp server runs; started by `tests.support.llama`, which says with which options."""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--key")
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--parallel", type=int, default=4)
    return parser.parse_args()


def _parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = {options.alias}
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.parallel
    params.n_ctx = 4096 * options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.use_jinja = True
    params.endpoint_metrics = True
    params.warmup = params.ui = params.fit_params = False
    params.verbosity = -1
    if options.key:
        params.api_keys = [options.key]
    if options.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return params


def main() -> None:
    server = xllamacpp.Server(_parameters(_options()))
    print("listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
