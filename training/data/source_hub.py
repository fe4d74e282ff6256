"""A dataset of the Hugging Face Hub (or a local folder that `datasets` can read), streamed."""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import UserError
from configs.schema import Source
from training.data.document import Document, Tally, valid_unicode


def hub_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """A row is a document, in the dataset's own order; no code from the dataset is ever run.

    Raises:
        UserError: the dataset, subset, split or column does not exist, or cannot be reached.
    """
    import datasets  # heavy; only hub sources pay for it

    assert source.path is not None, "the schema demands a path"
    name = source.path if source.subset is None else f"{source.path} ({source.subset})"
    number = 0
    try:
        rows = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        if rows.column_names is not None:
            _demand_column(source.text_key, list(rows.column_names), name)
            rows = rows.select_columns([source.text_key])
        for number, row in enumerate(rows):
            _demand_column(source.text_key, list(row), name)
            value = row[source.text_key]
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"dataset {name}: column {source.text_key!r} holds {type(value).__name__}, not text; set text_key"
                )
            text = valid_unicode(value or "", f"dataset {name}, row {number}", source.on_bad_bytes, tally)
            if text is not None:
                yield Document(f"{name}/{source.split}:{number}", text)
    except UserError:
        raise
    except Exception as error:  # other people's networks and formats: dozens of types, all the same to the user
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset {name}, split {source.split!r}: cannot be read at row {number} "
            f"({type(error).__name__}: {reason}); "
            "check the name, subset, split and the network, or point a local source at a copy; running again resumes"
        ) from error


def _demand_column(key: str, columns: list[str], name: str) -> None:
    if key not in columns:
        raise UserError(
            f"dataset {name}: no column {key!r}; columns: {', '.join(columns)}; set text_key of the data source"
        )
