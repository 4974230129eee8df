"""Text going in and coming out: chat templates, detokenising, stop strings. Knows no engine."""
