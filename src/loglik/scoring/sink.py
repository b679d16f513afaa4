"""Scored rows on disk: written in parts that are complete or absent, merged into one file at the end.

While a run lasts, ``<output>.parts`` holds ``manifest.json`` and, per part, a data file and a record. A part counts
once its record stands, and the record is renamed into place after the data. The merged file is renamed over the output
before any part is removed, and the manifest says so before that. Killed at any moment, a run loses at most the rows
that were not committed, and none is written twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import pyarrow as pa

from loglik.errors import InputError
from loglik.scoring.formats import FORMATS, Jsonl
from loglik.scoring.rows import COLUMNS, PER_TOKEN_COLUMNS, PER_WORD_COLUMNS, InputRow, ScoredRow

__all__ = ["InputDigest", "Sink", "open_sink"]

_VERSION = 1
_OWN_FILE = re.compile(r"(manifest\.json|part-\d{8}\.(json|jsonl|ndjson|parquet|csv))(\.tmp)?|(merged|probe)\.tmp")


class InputDigest:
    """SHA-256 over the rows that were read, so that a resumed run can tell whether its input is still the same."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, row: InputRow) -> None:
        """Take in the id, texts and error of the next row."""
        for text in (row.id, row.prompt, row.completion, row.error):
            # Lengths in front keep ("ab", "c") and ("a", "bc") apart.
            data = b"" if text is None else text.encode("utf-8", "surrogatepass")
            self._hash.update(b"-" if text is None else b"%d:" % len(data))
            self._hash.update(data)

    def hexdigest(self) -> str:
        """The digest of all rows so far, in hexadecimal."""
        return self._hash.hexdigest()


class Sink(Protocol):
    """Where scored rows go.

    Attributes:
        done_rows: rows that an earlier run has already committed; the caller goes on after them.
        resume_digest: `InputDigest` of those rows as the earlier run read them; None where there are none, or where
            the output is complete.
        complete: the output is finished; then neither `commit` nor `finish` is called.
    """

    done_rows: int
    resume_digest: str | None
    complete: bool

    def commit(self, rows: Sequence[ScoredRow], digest: str) -> None:
        """Write `rows`, all or none of them; `digest` covers the input up to their end."""

    def finish(self) -> None:
        """Put the whole output in its place."""

    def committed(self) -> Iterator[ScoredRow]:
        """The rows that are done, read back from the disk."""


def open_sink(
    output: str | Path,
    *,
    settings: Mapping[str, Any],
    per_token: bool,
    resume: bool,
    overwrite: bool,
    per_word: bool = False,
    stdout: TextIO | None = None,
) -> Sink:
    r"""The sink for `output`, refused here and not after the work if it cannot be written.

    JSONL has one object per row with every column; infinite numbers are ``-Infinity`` and ``Infinity``, which Python
    reads back. CSV has a header, lines that end in ``\r\n``, an empty cell for None, lists as JSON, and other values
    as in JSONL. Parquet carries `settings` as JSON in its schema metadata under ``loglik``. Half of a surrogate pair,
    which UTF-8 cannot hold, is written as its escape, such as ``\ud800``.

    Args:
        output: a file (.jsonl, .ndjson, .parquet or .csv), or ``-`` for JSONL on standard output, without parts.
        settings: what the numbers depend on, as JSON values; a run is resumed only under equal settings.
        per_token: write tokens and their log-probabilities too.
        per_word: write words and their log-probabilities too.
        resume: go on with an unfinished run, or start one if there is none.
        overwrite: discard an existing output and an unfinished run.
        stdout: what ``-`` writes to; the process's own standard output if None.

    Raises:
        InputError: for an output that cannot be written or is already there, contradicting options, or settings that
            differ from those of the unfinished run.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other: pass one of them")
    columns = COLUMNS + PER_TOKEN_COLUMNS * per_token + PER_WORD_COLUMNS * per_word
    if str(output) == "-":
        if resume:
            raise InputError("standard output cannot be resumed: write to a file with --output")
        return _StreamSink(stdout if stdout is not None else sys.stdout, columns)
    format_ = FORMATS.get(Path(output).suffix.lower())
    if format_ is None:
        raise InputError(
            f"the format of {output} is not known from its extension: use one of {', '.join(FORMATS)}, or - for "
            "JSONL on standard output"
        )
    # As JSON, so that they compare equal to what comes back from the manifest.
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    sink = _PartsSink(Path(output), format_(columns, plain), {"columns": list(columns), "settings": plain})
    sink.open(resume=resume, overwrite=overwrite)
    return sink


# ---------------------------------------------------------------------- sinks
class _StreamSink:
    """JSONL on a text stream, flushed after every chunk."""

    def __init__(self, stream: TextIO, columns: Sequence[str]) -> None:
        self.done_rows, self.complete = 0, False
        self.resume_digest: str | None = None
        self._stream, self._format = stream, Jsonl(columns, {})

    def commit(self, rows: Sequence[ScoredRow], digest: str) -> None:
        chunk = io.BytesIO()
        self._format.write(rows, chunk)
        text = chunk.getvalue().decode("utf-8")
        # JSON may escape whatever the terminal's encoding cannot show; there, "\\u" escapes keep it valid.
        encoding = self._stream.encoding or "utf-8"
        if encoding.lower().replace("-", "") != "utf8":
            lines = text.removesuffix("\n").split("\n") if text else []
            text = "".join(json.dumps(json.loads(line)) + "\n" for line in lines)
        self._stream.write(text)
        self._stream.flush()
        self.done_rows += len(rows)

    def finish(self) -> None:
        self._stream.flush()

    def committed(self) -> Iterator[ScoredRow]:
        return iter(())  # what a stream has taken is gone


class _PartsSink:
    """Parts in ``<output>.parts``, merged into the output by `finish`."""

    def __init__(self, output: Path, format_: Jsonl, identity: dict[str, Any]) -> None:
        self.done_rows = 0
        self.resume_digest: str | None = None
        self.complete = False
        self._output, self._format, self._identity = output, format_, identity
        self._parts = output.with_name(output.name + ".parts")
        self._extension = output.suffix.lower()
        self._manifest = self._parts / "manifest.json"
        self._merged = self._parts / "merged.tmp"
        self._count = 0  # committed parts
        self._discard = False  # what is there goes when the first rows come: until then, a run may still fail to start
        self._state: str | None = None  # "open" or "merging", as the manifest on disk says; None: there is none

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Probe, clear or take up what is there."""
        output, parts = self._output, self._parts
        try:
            if output.is_dir():
                raise InputError(f"{output} is a directory: name a file with --output")
            if not output.parent.is_dir():
                raise InputError(f"the directory {output.parent} does not exist: create it or choose another --output")
            if parts.exists() and not (resume or overwrite):
                raise InputError(
                    f"{parts} holds an unfinished run; pass --resume to continue it or --overwrite to discard it"
                )
            if output.exists() and not (resume or overwrite):
                raise InputError(f"{output} exists; pass --overwrite to replace it or choose another --output")
            self._probe()
            self._discard = overwrite
            if resume:
                self._take_up()
        except OSError as error:
            raise InputError(f"{output} cannot be written ({_reason(error)}): choose another --output") from None

    def commit(self, rows: Sequence[ScoredRow], digest: str) -> None:
        """One part: data first, then the record that makes it count."""
        if not rows:
            return
        try:
            self._mark("open")
            data, record = self._part(self._count)
            with _atomic(data) as handle:
                self._format.write(rows, handle)
            total = self.done_rows + len(rows)
            _write_json(
                record, {"rows": len(rows), "total_rows": total, "digest": digest, "bytes": data.stat().st_size}
            )
            _sync_directory(self._parts)
        except OSError as error:
            raise self._unwritable(error) from None
        self._count += 1
        self.done_rows = total

    def finish(self) -> None:
        """Merge, rename over the output, remove the parts."""
        try:
            self._mark("open")
            with self._merged.open("wb") as handle:
                self._format.merge((self._part(index)[0] for index in range(self._count)), handle)
                handle.flush()
                os.fsync(handle.fileno())
            # From here on, a missing merged file means that it has become the output.
            self._mark("merging", bytes=self._merged.stat().st_size, rows=self.done_rows)
            os.replace(self._merged, self._output)
            _sync_directory(self._output.parent)
            self._clear()
        except (OSError, pa.ArrowException) as error:
            raise self._unwritable(error) from None
        self.complete = True

    def committed(self) -> Iterator[ScoredRow]:
        """Rows of the finished output, or of the parts so far."""
        if self.complete:
            yield from self._format.read(self._output, part=False)
        else:
            for index in range(self._count):
                yield from self._format.read(self._part(index)[0], part=True)

    # ------------------------------------------------------------------ steps of opening
    def _probe(self) -> None:
        """Write for real: permission bits do not tell what a file system allows."""
        existed = self._parts.is_dir()
        self._parts.mkdir(exist_ok=True)
        probe = self._parts / "probe.tmp"
        try:
            probe.write_bytes(b"probe")
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
            if not existed:
                self._parts.rmdir()

    def _take_up(self) -> None:
        if not self._manifest.exists():  # written first and removed last: without it, no part is left
            if self._output.exists():
                self._take_up_output()
            self._clear()
            return
        manifest = self._read_manifest()
        self._compare(manifest, f"the unfinished run in {self._parts}")
        self._state = manifest["state"]
        if self._output.exists():
            # The parts are only removed, and the merged file only renamed, once it is the output.
            merged = self._state == "merging" and not self._merged.exists()
            if not merged or self._output.stat().st_size != manifest.get("bytes"):
                raise InputError(
                    f"{self._output} exists and is not the result of the unfinished run in {self._parts}: move it "
                    "elsewhere to resume, or pass --overwrite to discard both"
                )
            self.done_rows, self.complete = int(manifest["rows"]), True
            self._clear()
            return
        self._mark("open")
        self._count_parts()
        kept = {path.name for index in range(self._count) for path in self._part(index)} | {self._manifest.name}
        for path in self._own_files():
            if path.name not in kept:
                path.unlink()

    def _take_up_output(self) -> None:
        try:
            self.done_rows, stored = self._format.stored(self._output)
        except (OSError, ValueError):  # Arrow's own errors are of these two types
            raise InputError(f"{self._output} is damaged: pass --overwrite to write it anew") from None
        if stored is not None:
            self._compare(stored, str(self._output))
        self.complete = True

    def _count_parts(self) -> None:
        """Take the committed parts from the first on; one that does not fit its record ends them."""
        while True:
            data, path = self._part(self._count)
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                fits = record["bytes"] == data.stat().st_size
                fits = fits and record["total_rows"] == self.done_rows + record["rows"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                return
            if not fits:
                return
            self._count += 1
            self.done_rows, self.resume_digest = record["total_rows"], record["digest"]

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads(self._manifest.read_text(encoding="utf-8"))
            sound = manifest["version"] == _VERSION and manifest["state"] in ("open", "merging")
            sound = sound and isinstance(manifest["settings"], dict) and isinstance(manifest["columns"], list)
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise InputError(
                f"{self._manifest} is damaged or of another version of loglik: pass --overwrite to start anew"
            )
        return manifest

    def _compare(self, there: Mapping[str, Any], what: str) -> None:
        """Refuse to go on under other settings, naming each."""
        now, before = (
            {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}
            for settings in (self._identity["settings"], there["settings"])
        )
        names = [n for n in sorted({*now, *before}) if now.get(n) != before.get(n)]
        changes = [f"{n} was {before.get(n, 'not set'):.60} and is {now.get(n, 'not set'):.60}" for n in names]
        if there["columns"] != self._identity["columns"] and not {"per_token", "level"} & set(names):
            changes.append("per_token differs")
        if changes:
            raise InputError(
                f"{what} has other settings ({'; '.join(changes)}): pass the same ones to resume, or --overwrite to "
                "discard it"
            )

    # ------------------------------------------------------------------ files
    def _part(self, index: int) -> tuple[Path, Path]:
        return self._parts / f"part-{index:08d}{self._extension}", self._parts / f"part-{index:08d}.json"

    def _mark(self, state: str, **more: int) -> None:
        """Have the manifest say `state`; the first call creates the directory."""
        if self._state == state:
            return
        if self._discard:
            self._output.unlink(missing_ok=True)
            self._clear()
            self._discard = False
        if self._state is None:
            self._parts.mkdir(exist_ok=True)
            if self._manifest.exists():
                raise InputError(f"another run has begun to write {self._output}: choose another --output")
        _write_json(self._manifest, {"version": _VERSION, "state": state, **more, **self._identity})
        self._state = state

    def _own_files(self) -> list[Path]:
        return [path for path in sorted(self._parts.iterdir(), reverse=True) if _OWN_FILE.fullmatch(path.name)]

    def _clear(self) -> None:
        """Remove the parts from the last to the first, so that what is left of them is always a beginning."""
        if not self._parts.exists():
            return
        for path in self._own_files():
            if path != self._manifest:
                path.unlink()
        self._manifest.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files may lie there: they are left alone
            self._parts.rmdir()
        self._state = None

    def _unwritable(self, error: Exception) -> InputError:
        return InputError(f"{self._output} cannot be written ({_reason(error)}): mend that and go on with --resume")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that is complete, and on the disk, before it gets its name."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with _atomic(path) as handle:
        handle.write(json.dumps(value, indent=1).encode())


def _sync_directory(path: Path) -> None:
    """Make renames in `path` survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
