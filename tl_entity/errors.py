"""What a person did that cannot be done, said in one sentence."""


class InputError(ValueError):
    """The input cannot be used: the message says what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2.
    """
