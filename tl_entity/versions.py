"""Which TransformerLens is installed. Needs neither it nor torch."""

from tl_entity.errors import InputError


def check_transformer_lens(installed: str | None = None) -> None:
    """Make sure that HookedTransformer is there: TransformerLens 4 has it no more.

    Args:
        installed: the version; looked up if left out.

    Raises:
        InputError: saying what to install.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = installed or version("transformer_lens")
    except PackageNotFoundError:
        return  # a copy on the path, or none, of which its import will tell
    if int(installed.split(".")[0]) >= 4:
        raise InputError(
            f"TransformerLens {installed} is installed, which has no HookedTransformer any more; "
            "install one that has it: pip install 'transformer_lens>=3.9,<4'."
        )
