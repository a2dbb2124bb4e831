"""Which versions of optional libraries a module was tried with; another is refused where it is imported."""

from importlib.metadata import version

from packaging.version import Version


def require(library: str, first: str, below: str) -> None:
    """Refuse a version of `library` outside of [first, below).

    Raises:
        ImportError: naming what is installed and the range that works.
    """
    found = version(library)  # its PackageNotFoundError says what is missing, and is an ImportError
    if not Version(first) <= Version(found) < Version(below):
        raise ImportError(f"{library} is {found}; expected >={first},<{below} here")
