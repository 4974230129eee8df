"""One use case a file: a validated request in, events and answers out. Knows no HTTP."""
