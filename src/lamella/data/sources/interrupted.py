"""What ends a reading for no fault of the sources."""

from lamella.errors import UserError


class Interrupted(UserError):
    """A network failed, say: what was prepared so far is worth keeping."""
