"""Attention over the paged K/V pool, one file a back end."""
