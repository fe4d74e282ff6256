"""The default corpus: the Python sources that every machine with Python has."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError
from configs.schema import Source
from training.data.document import Document, Tally

_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages"})


def _python_files(root: Path, prune: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """(name relative to `root`, path) of each `*.py` below it, in the order of the names."""
    found: list[tuple[str, Path]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in prune]
        here = Path(folder)
        found.extend(
            ((here / name).relative_to(root).as_posix(), here / name) for name in files if name.endswith(".py")
        )
    return iter(sorted(found))


def stdlib_files(source: Source) -> list[tuple[str, Path]]:
    """(key, path) of each source file: the interpreter's own, then the installed packages' when `packages` is set.

    Raises:
        UserError: this Python came without its library's sources.
    """
    paths = sysconfig.get_paths()
    files = [(f"stdlib/{name}", path) for name, path in _python_files(Path(paths["stdlib"]), _PACKAGE_FOLDERS)]
    if not files:
        raise UserError(
            f"{paths['stdlib']}: no *.py of the standard library there (a stripped Python); use a source of kind text"
        )
    if source.packages:
        for folder in sorted({paths["purelib"], paths["platlib"]}):
            files += [(f"packages/{name}", path) for name, path in _python_files(Path(folder), frozenset())]
    return files


def stdlib_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """One document per file, decoded by its coding cookie; files that no Python could decode (test data) are skipped
    and counted.
    """
    for key, path in stdlib_files(source):
        try:
            with tokenize.open(path) as handle:
                text = handle.read()
        except (SyntaxError, UnicodeDecodeError):
            tally.skipped += 1
            continue
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        yield Document(key, text)
