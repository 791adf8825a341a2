"""CleanAI: prunes a network and measures what that cost."""

__version__ = "1.0.0"


class UserError(Exception):
    """A problem that the user can solve. The message is the one line that a script prints; it says what to do next.

    Line breaks and other control characters in it, as in a name that comes from a file, are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        super().__init__("".join(printable))
