"""What the API does, held against OpenAI's published document; writes docs/conformance.md."""
