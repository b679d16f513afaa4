"""Lines and their bits."""

from __future__ import annotations

import math

from loglik.scoring.lines import ScoredLine, scored_lines

LN2 = math.log(2)


def test_bits_fall_on_the_line_that_a_token_starts_on():
    tokens = ["a", "b\n", "\n", "  c", " d\n"]
    log_probs = [None, -1 * LN2, -2 * LN2, -4 * LN2, -8 * LN2]
    assert list(scored_lines(tokens, log_probs)) == [
        ScoredLine(1, "ab", 1.0, 1, 2),
        ScoredLine(2, "", 2.0, 1, 1),
        ScoredLine(3, "  c d", 12.0, 2, 6),
    ]


def test_lines_spell_the_text_and_lose_no_bit():
    tokens = ["x = ", "1", "\n\n", "y", " = 2", "\nz"]
    log_probs = [-0.5, -1.0, -0.25, -2.0, -3.0, -4.0]
    lines = list(scored_lines(tokens, log_probs))
    assert "\n".join(line.text for line in lines) == "".join(tokens)
    assert [line.number for line in lines] == [1, 2, 3, 4]
    assert math.fsum(line.bits for line in lines) == math.fsum(-v / LN2 for v in log_probs)
    assert sum(line.num_bytes or 0 for line in lines) == len("".join(tokens))


def test_a_character_cut_into_tokens_is_whole_in_its_line():
    line = next(scored_lines(["漣", "", "", "x"], [-1.0, -1.0, -1.0, -1.0]))
    assert (line.text, line.num_tokens, line.num_bytes) == ("漣x", 4, 4)


def test_empty():
    assert list(scored_lines([], [])) == []
