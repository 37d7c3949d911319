"""The one exception that people are meant to read."""


class UserError(ValueError):
    """A mistake its reader can mend: the message names the file or setting and the way out.

    Command lines print it as one line and exit with status 2; it is never shown as a stack trace.
    """
