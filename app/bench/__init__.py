"""Timing this server beside others on a CPU, through HTTP: who, with what, how, the table."""
