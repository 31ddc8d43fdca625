"""The one exception that means: the user gave something wrong, and one line says what would be right."""


class UsageError(ValueError):
    """A wrong flag, file or checkpoint. Its message is one line that names it and what would be right.

    A door (`run_pretraining.py`, ...) turns it into one line on stderr and exit code 2.
    """
