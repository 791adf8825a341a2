"""CleanAI: prune a network, and tell honestly what that did."""

__version__ = "5.1.0"


class UserError(Exception):
    """A problem its user can mend: the message is the one line a script prints, and says what to do next."""
