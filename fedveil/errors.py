"""The exceptions a user is meant to read, by kind where somebody goes on after one."""


class FedveilError(Exception):
    """Something the user can mend.

    The message names the thing, its value, what is allowed and what to do. The command line prints
    it without a traceback and exits with status 2.
    """


class InapplicableAttackError(FedveilError):
    """An attack that does not fit the model, the batch or what clients return; another may."""


class UnreachableCapError(FedveilError):
    """No noise keeps the copies of a model below its cap."""
