"""Strategies for hypothesis that several tests draw from."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def nested_texts(draw, tokens, *, longest: int, times: int, more: int):
    """Texts that continue beginnings of one another: 1 to 4 of up to `longest` tokens, then up to `times` branches."""
    texts = draw(st.lists(st.lists(tokens, max_size=longest), min_size=1, max_size=4))
    for _ in range(draw(st.integers(0, times))):
        old = draw(st.sampled_from(texts))
        texts.append(old[: draw(st.integers(0, len(old)))] + draw(st.lists(tokens, max_size=more)))
    return texts
