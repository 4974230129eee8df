"""Structured output: what a request demands, compiled with llguidance into a token constraint."""
