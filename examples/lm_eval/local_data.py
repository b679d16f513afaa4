"""Documents of the tasks in this folder, made from the rows of local files."""

from __future__ import annotations

import re
import zlib

from datasets import Dataset

TITLE = re.compile(r" = [^=]+ = ?$")


def with_choices(rows: Dataset) -> Dataset:
    """Problems with four numbers to choose from, the right one at a place that the question decides."""
    documents = []
    for row in rows:
        answer = int(row["answer"].split("#### ")[-1].replace(",", ""))
        choices = [str(number) for number in (answer + 1, 2 * answer + 3, answer - 10)]
        label = zlib.crc32(row["question"].encode()) % 4
        choices.insert(label, str(answer))
        documents.append({"question": row["question"], "choices": choices, "label": label})
    return Dataset.from_list(documents)


def articles(lines: Dataset) -> Dataset:
    """Lines joined to articles, each of which begins with its title between single equals signs."""
    pages: list[list[str]] = []
    for line in lines["text"]:
        if TITLE.match(line) or not pages:
            pages.append([])
        pages[-1].append(line)
    return Dataset.from_list([{"page": page} for page in ("\n".join(page) for page in pages) if page.strip()])
