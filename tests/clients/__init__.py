"""Real client libraries against a running server; `scripts/clients` runs them, pytest does not."""
