"""Routes, a file a use case."""
