"""What tests stand on: real servers started on the spot, and an upstream that misbehaves on request.

* `postgres`, `valkey`, `llama`: the real servers, from the wheels that carry them.
* `upstream`: a scripted OpenAI-compatible upstream that can break the protocol and keeps a ledger.
* `gateway`: the product itself, started the way its users start it.

Everything listens on loopback, on a port or socket of its own, and ends what it started by its process id.
"""
