"""CleanAI: prunes a network and measures what that cost."""

__version__ = "1.0.0"


class UserError(Exception):
    """A problem that the user can solve. The message is the one line that a script prints; it says what to do next."""
