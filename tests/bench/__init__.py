"""What the gateway costs, beside a bare pass-through: see `tests.bench.__main__`."""
