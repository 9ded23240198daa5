"""The two ways a command ends early: the user can mend it (exit code 2), or the run stopped and saved (75)."""

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: saved and stopped, start me again


class UserError(ValueError):
    """Something the user can mend: the message is one line that says what, why and the cure."""
