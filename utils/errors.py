class UserError(Exception):
    """Something that the user can mend: bad input, a missing file, a full disk.

    The message is one line that says what was given, what is needed and how to mend it. Front-ends print it alone,
    without a traceback, and exit with code 2.
    """
