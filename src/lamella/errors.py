"""The ways a command ends early: the user can mend it (2), the run stopped and saved (75), or hung (70)."""

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_HUNG = 70  # EX_SOFTWARE: no step for too long
EXIT_REQUEUE = 75  # EX_TEMPFAIL: saved and stopped, start me again


class UserError(ValueError):
    """Something the user can mend: the message is one line that says what, why and the cure."""
