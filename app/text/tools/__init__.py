"""Tool calls as text: how a model is told of tools, made to call them, and read when it does."""
