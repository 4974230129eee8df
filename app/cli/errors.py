"""What a command that talks to a server can fail with, beside ModelError."""


class RequestFailed(Exception):
    """The server refused a request, or could not be reached; says why in a line."""
