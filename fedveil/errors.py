"""The one exception a user is meant to read."""


class FedveilError(Exception):
    """Something the user can mend.

    The message names the thing, its value, what is allowed and what to do. The command line prints
    it without a traceback and exits with status 2.
    """
