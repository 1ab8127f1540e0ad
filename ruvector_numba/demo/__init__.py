"""What the command `ruvector-numba demo` shows: `digits` and `transformer` one after the other, `graph` by its name."""
