"""The embedded models' text: split by module, nothing in both parts."""

from __future__ import annotations

from loglik.models.stdlib_text import HELD_OUT, stdlib_documents


def test_parts_do_not_share_a_module():
    train, held_out = list(stdlib_documents("train")), list(stdlib_documents("held_out"))
    assert {d.module for d in held_out} == set(HELD_OUT)
    assert not {d.module for d in train} & set(HELD_OUT)
    assert any(d.name.startswith("pydoc_data/topics.py#") for d in train)
    assert sum(len(d.text) for d in train) > 20 * sum(len(d.text) for d in held_out)
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_test_suites_and_undecodable_files_are_left_out(tmp_path):
    for name in ("a.py", "heapq.py", "pkg/b.py", "pkg/test/c.py", "test/d.py", "encodings/e.py", "blank.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "blank.py" else f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert [d.name for d in stdlib_documents("train", root=tmp_path)] == ["a.py", "pkg/b.py"]
    assert [(d.name, d.module, d.text) for d in stdlib_documents("held_out", root=tmp_path)] == [
        ("heapq.py", "heapq", "# heapq.py\n")
    ]
