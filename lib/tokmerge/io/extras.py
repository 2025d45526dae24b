"""Packages that come with an extra: where one is missing, the extra to install is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what an extra brings.

    Args:
        name: of the extra in pyproject.toml.

    Raises:
        ModuleNotFoundError: a package is not installed; the message names the extra.

    >>> with extra("search"):
    ...     import no_such_package
    Traceback (most recent call last):
    ModuleNotFoundError: no_such_package is not installed: pip install 'tokmerge[search]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tokmerge"):
            raise
        raise ModuleNotFoundError(f"{error.name} is not installed: pip install 'tokmerge[{name}]'") from None


def require(name: str, *packages: str) -> None:
    """Raise what `extra` raises if a package is not installed, without importing it: some take seconds.

    >>> require("privacy", "torch", "no_such_package")
    Traceback (most recent call last):
    ModuleNotFoundError: no_such_package is not installed: pip install 'tokmerge[privacy]'
    """
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install 'tokmerge[{name}]'")
