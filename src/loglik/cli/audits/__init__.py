"""One audit per module: rows and a model in; a table, a summary and a page out."""
