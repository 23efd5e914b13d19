"""The one exception type of this package."""


class CraftError(ValueError):
    """Input that cannot be used: says what was found, what is required and what to do.

    Every error that a user of `craft_peft` can cause is a `CraftError`, so that a program (the command line, a
    training service) can tell a mistake in its input from a defect in the code. It is a `ValueError`, so that code
    written for PEFT, which raises `ValueError`, keeps working.

    Example:
        >>> from craft_peft import CraftConfig, CraftError
        >>> try:
        ...     CraftConfig(ranks=(4, 0, 8))
        ... except CraftError as error:
        ...     print(type(error).__mro__[1].__name__)
        ValueError
    """
