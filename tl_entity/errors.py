"""What a person did that cannot be done, said in one sentence."""


class InputError(ValueError):
    """The input cannot be used: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2.
    """


class ArgumentError(InputError, TypeError):
    """An argument is of another type than it must be: the message says which, what it is, and what
    is wanted."""
