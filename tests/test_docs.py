"""The pages are true: their code runs, their tables are what the code computes, and their commands are accepted."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

import pytest
import tyro

import loglik
from loglik.cli import Command, main
from loglik.cli.audit import Audit, Audits
from loglik.cli.audits.common import ModelOptions, Outputs, RowAudit
from loglik.cli.demo import Demo
from loglik.cli.papers import Papers
from loglik.cli.reproduce import Reproduce
from loglik.cli.score import Score
from loglik.cli.train import Train
from loglik.kinds import Kind
from loglik.papers import papers
from loglik.papers.catalogue import status, verdict
from loglik.scoring.rows import COLUMNS, PER_TOKEN_COLUMNS, PER_WORD_COLUMNS
from loglik.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(loglik.__file__).parent
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = {
    "demo": Demo,
    "score": Score,
    "train": Train,
    "audit": Audit,
    "papers": Papers,
    "reproduce": Reproduce,
}
AUDITS = {typing.get_args(part)[1].name: typing.get_args(part)[0] for part in typing.get_args(Audits)}
OPTIONS = {name: kind for name, kind in COMMANDS.items() if name != "audit"} | {
    f"audit {name}": kind for name, kind in AUDITS.items()
}
SHARED_OPTIONS = {"Options of every audit of rows": RowAudit, "Options of every audit with a model": ModelOptions}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its `language`, its `code`, the `line` it starts on, and where it begins and ends in the page."""

    language: str
    code: str
    line: int
    begin: int
    end: int


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] for line in match["body"].splitlines(keepends=True))
        found.append(Block(match["language"], code, text.count("\n", 0, match.start()) + 1, match.start(), match.end()))
    return found


def examples(text: str) -> Iterator[tuple[Block, str | None]]:
    """Python blocks, each with the output that the page shows right after it."""
    all_blocks = blocks(text)
    for block, after in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        follows = after is not None and after.language == "text" and not text[block.end : after.begin].strip()
        yield block, after.code if after is not None and follows else None


def commands(text: str) -> list[list[str]]:
    """Words of every shell command, cut at pipes and redirections."""
    found = []
    for block in blocks(text):
        if block.language not in ("bash", "sh", "shell", "console"):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if set(word) <= set("|<>;&"):
                    found.append(words)
                    words = []
                else:
                    words.append(word)
    return [words for words in found if words]


def section(text: str, title: str) -> str:
    """The text under the heading `title`, up to the next one of its level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def table(text: str) -> list[list[str]]:
    """Rows of the first Markdown table, its heading first."""
    lines = re.search(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    assert lines is not None, "no table"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return [rows[0], *rows[2:]]


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------- code
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=page_id)
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block, expected in examples(page.read_text(encoding="utf-8")):
        # Empty lines in front give a traceback the page's own line numbers.
        exec(compile("\n" * block.line + block.code, page_id(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if expected is not None:
            assert doctest.OutputChecker().check_output(expected, printed, LOOSE), (
                f"{page_id(page)}:{block.line} prints\n{printed}"
            )


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if ">>>" in p.read_text(encoding="utf-8")],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_docstring_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = ".".join(["loglik", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    outcome = doctest.testmod(importlib.import_module(name), optionflags=LOOSE)
    assert outcome.attempted > 0
    assert outcome.failed == 0


# ---------------------------------------------------------------------- tables
def test_table_of_differences_is_what_kinds_compute():
    rows = table(section((DOCS / "kinds.md").read_text(encoding="utf-8"), "Arithmetic"))
    columns = [Kind[name] for cell in rows[0][1:] for name in code_words(cell)]
    assert columns == list(Kind)
    assert [Kind[code_words(row[0])[0]] for row in rows[1:]] == list(Kind)
    for row in rows[1:]:
        a = Kind[code_words(row[0])[0]]
        for b, cell in zip(columns, row[1:], strict=True):
            assert [Kind[name] for name in code_words(cell)] == [a - b], f"{a.name} - {b.name}"


def test_every_kind_is_explained():
    rows = table(section((DOCS / "kinds.md").read_text(encoding="utf-8"), "Kinds"))
    assert [Kind[code_words(row[0])[0]] for row in rows[1:]] == list(Kind)


def test_output_columns():
    rows = table(section((DOCS / "scoring.md").read_text(encoding="utf-8"), "Output columns"))
    assert [code_words(row[0])[0] for row in rows[1:]] == [*COLUMNS, *PER_TOKEN_COLUMNS, *PER_WORD_COLUMNS]


def test_training_settings():
    rows = table(section((DOCS / "training.md").read_text(encoding="utf-8"), "Settings"))
    stated = {code_words(row[0])[0]: row[1].strip("`") for row in rows[1:]}
    fields = dataclasses.fields(TrainConfig)
    assert stated == {f.name: "required" if f.default is dataclasses.MISSING else str(f.default) for f in fields}


# ---------------------------------------------------------------------- command line
def help_options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Every option that ``--help`` prints, without the opposites of flags."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = re.sub(r"\(default: .*?\)", "", capsys.readouterr().out)
    found = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)
    return {option for option in found if not option.startswith("--no-")} - {"-h", "--help"}


def choices(hint: Any) -> list[str]:
    """The words an option takes, where they are limited."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint)]
    if typing.get_origin(hint) in (typing.Union, UnionType, typing.Annotated):
        parts = typing.get_args(hint)
        return [word for part in parts if not isinstance(part, str) for word in choices(part)]
    return []


def option_rows(command: str) -> list[list[str]]:
    """Rows of the tables of a command's options: those that audits share stand in tables of their own."""
    if not command.startswith("audit "):
        return table(section((DOCS / "cli.md").read_text(encoding="utf-8"), f"loglik {command}"))[1:]
    text = (DOCS / "audits.md").read_text(encoding="utf-8")
    rows = table(section(text, f"loglik {command}"))[1:]
    for title, base in SHARED_OPTIONS.items():
        if issubclass(OPTIONS[command], base):
            rows += table(section(text, title))[1:]
    if not issubclass(OPTIONS[command], RowAudit) and issubclass(OPTIONS[command], Outputs):
        names = {f"--{field.name}" for field in dataclasses.fields(Outputs)}
        shared = table(section(text, next(iter(SHARED_OPTIONS))))[1:]
        rows += [row for row in shared if code_words(row[0])[0] in names]
    return rows


def test_every_command_has_a_section(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = re.search(r"\{([\w,-]+)\}", capsys.readouterr().out)
    assert offered is not None
    titles = re.findall(r"^## loglik (\S+)$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(titles) == set(offered[1].split(",")) == set(COMMANDS)


def test_every_audit_has_a_section():
    text = (DOCS / "audits.md").read_text(encoding="utf-8")
    assert re.findall(r"^## loglik audit (\S+)$", text, re.MULTILINE) == list(AUDITS)
    offered = [row[1] for row in table(text)[1:]]
    assert re.findall(r"\(#loglik-audit-([\w-]+)\)", " ".join(offered)) == list(AUDITS)


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_a_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = option_rows(command)
    names = [code_words(row[0]) for row in rows]
    assert {name for group in names for name in group if name.startswith("-")} == help_options(command, capsys)
    hints = typing.get_type_hints(OPTIONS[command], include_extras=True)
    by_name = {
        group[0].removeprefix("--").replace("-", "_").lower(): row for group, row in zip(names, rows, strict=True)
    }
    fields = dataclasses.fields(OPTIONS[command])
    assert len(rows) == len(by_name)
    assert set(by_name) == {field.name for field in fields}
    for field in fields:
        _, values, default, meaning = by_name[field.name]
        assert code_words(values) == choices(hints[field.name])
        unset = field.default in (None, False, "")
        stated = str(field.default).replace("\n", "\\n").strip()
        assert default == ("required" if field.default is dataclasses.MISSING else "" if unset else f"`{stated}`")
        assert meaning


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_on_a_page_are_accepted(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *args in commands(page.read_text(encoding="utf-8")):
        if program == "loglik" and args != ["--help"]:
            parsed = tyro.cli(Command, args=args)
            assert isinstance(parsed, COMMANDS[args[0]])
        elif program == "make":
            assert set(args) <= set(targets)


def test_a_command_that_does_not_exist_is_noticed():
    words = commands("```bash\ncat a | loglik score - -m tiny \\\n    --no-such-option 1 > b\n```\n")
    assert words == [["cat", "a"], ["loglik", "score", "-", "-m", "tiny", "--no-such-option", "1"], ["b"]]
    with pytest.raises(SystemExit):
        tyro.cli(Command, args=words[1][1:])


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_that_a_page_names_exist(page):
    for file, function in re.findall(r"`(test_\w+\.py)::(test_\w+)`", page.read_text(encoding="utf-8")):
        (path,) = (ROOT / "tests").rglob(file)
        assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{function}"


def test_api_pages_name_what_exists():
    """Every identifier of the API pages can be imported, and every public module is on one of them."""
    named = [
        n for page in (DOCS / "api").glob("*.md") for n in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)
    ]
    assert len(named) == len(set(named))
    for name in named:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, attribute = name.rsplit(".", 1)
            assert hasattr(importlib.import_module(module), attribute), name
    internal = {"loglik.progress", "loglik.models.tokens"}
    modules = {m.name for m in pkgutil.walk_packages(loglik.__path__, "loglik.") if not m.ispkg}
    public = {name for name in modules - internal if not name.startswith(("loglik.cli.", "loglik.__main__"))}
    assert public - set(named) - {name.rpartition(".")[0] for name in named} == set()


def test_formulas_are_shown_as_code():
    """A formula that Markdown gets to see loses its underscores."""
    pytest.importorskip("griffe")
    as_markdown = load(DOCS / "griffe_math.py").as_markdown
    text = "One :math:`x_t`.\n\n    .. math::\n        a_1 \\\\\n        b_2\n\n    .. math:: c_3\n\nAfter."
    shown = "One `x_t`.\n\n    ```latex\n    a_1 \\\\\n    b_2\n    ```\n\n    ```latex\n    c_3\n    ```\n\nAfter."
    assert re.sub(r"\n{2,}", "\n\n", as_markdown(text)) == shown
    for path in PACKAGE.rglob("*.py"):
        left = as_markdown(path.read_text(encoding="utf-8"))
        assert ":math:" not in left, path.name
        assert ".. math" not in left, path.name


# ---------------------------------------------------------------------- site
def test_site_builds_without_a_warning(tmp_path):
    """Links, anchors and docstrings. Not with --quiet: it hides warnings from --strict, which then finds none."""
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "DISABLE_MKDOCS_2_WARNING": "true",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


# ---------------------------------------------------------------------- papers
class _Cells(HTMLParser):
    """Cells and links of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_papers_is_the_catalogue():
    hooks = load(DOCS / "hooks.py")
    page = (DOCS / "papers.md").read_text(encoding="utf-8")
    assert page.count(hooks.MARKER) == 1
    cells = _Cells()
    cells.feed(hooks.on_page_markdown(page).split(hooks.MARKER)[0].partition("<table>")[2])
    expected = [
        [p.id, p.title, p.month, p.kind, status(p), verdict(p, ROOT / "reproductions"), p.description] for p in papers()
    ]
    assert [[unescape(cell).rstrip("\n") for cell in row] for row in cells.rows[1:]] == expected
    assert len(expected) == 128
    assert cells.links == [f"https://arxiv.org/abs/{p.arxiv}" for p in papers() if p.arxiv is not None]
