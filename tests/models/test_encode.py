"""The text front: where the boundary is, what is scored, how many bytes that is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loglik.errors import InputError, RowError
from loglik.models.encode import TextEncoder
from zoo import bert_tokenizer, byte_level_tokenizer, llama_tokenizer, t5_tokenizer

BYTES = byte_level_tokenizer()
NO_BOS = byte_level_tokenizer(bos=False)
LLAMA = llama_tokenizer()
BERT = bert_tokenizer()
T5 = t5_tokenizer()


def causal(tokenizer=BYTES, **options) -> TextEncoder:
    return TextEncoder(tokenizer, layout="causal", **options)


def test_joint_tokens_are_the_tokens_of_the_joined_string():
    text = causal().encode("The answer", " is 42")
    assert text.content == BYTES("The answer is 42", add_special_tokens=False)["input_ids"]
    assert text.boundary == "aligned"
    assert "".join(text.pieces[text.start :]) == " is 42"
    assert text.num_bytes == len(" is 42")


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Ans", "wer"), ("hello wor", "ld"), ("The answer is ", "42"), ("yes", "yes")]
)
def test_straddling_token_is_scored_with_the_completion(prompt, completion):
    """lm-evaluation-harness #1322, #3336: an empty continuation where one token spans the join."""
    text = causal().encode(prompt, completion)
    whole = prompt + completion
    assert "".join(text.pieces) == whole
    before = "".join(text.pieces[: text.start])
    assert len(before) <= len(prompt)
    assert whole[len(before) :].endswith(completion)
    expected = "aligned" if len(before) == len(prompt) else "straddled"
    assert text.boundary == expected
    assert text.num_bytes == len(whole[len(before) :].encode())


def test_straddled_is_reported_for_a_word_and_for_a_trailing_space():
    assert causal().encode("Ans", "wer").boundary == "straddled"
    # The byte-level post-processor trims the space off the offsets of " yes": the straddle must show all the same.
    spaced = causal().encode("The answer is so. yes ", "yes")
    assert spaced.pieces[-1] == " yes"
    assert spaced.boundary == "straddled"
    assert spaced.num_bytes == len(" yes")


def test_offsets_do_not_depend_on_the_post_processor():
    untrimmed = TextEncoder(byte_level_tokenizer(trim_offsets=False), layout="causal")
    for prompt, completion in [("a ", "yes"), ("hello  ", " world"), ("\n ", "x")]:
        assert causal().encode(prompt, completion) == untrimmed.encode(prompt, completion)


def test_separate_boundary_is_the_other_convention():
    text = causal(boundary="separate").encode("Ans", "wer")
    left = BYTES("Ans", add_special_tokens=False)["input_ids"]
    right = BYTES("wer", add_special_tokens=False)["input_ids"]
    assert text.content == left + right
    assert text.start == len(left)
    assert text.boundary == "separate"
    assert text.num_bytes == 3


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    completion=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_completion_is_never_empty_and_never_loses_a_byte(prompt, completion):
    """For any text under a byte-level vocabulary: the scored tokens spell the completion and, straddled, a bit more."""
    text = causal().encode(prompt, completion)
    scored = BYTES.decode(text.content[text.scored_from :], clean_up_tokenization_spaces=False)
    if "\ufffd" not in scored or "\ufffd" in prompt + completion:
        assert scored.endswith(completion)
        assert (scored == completion) == (text.boundary in ("aligned", "none"))
    assert len(scored.encode()) >= len(completion.encode()) or "\ufffd" in scored
    assert text.scored_from == text.start < len(text.content)
    whole = BYTES(prompt + completion, add_special_tokens=False)["input_ids"]
    assert text.content == whole
    assert "".join(text.pieces) == prompt + completion
    if "\ufffd" not in scored:
        assert text.num_bytes == len(scored.encode())


def test_bos_policy():
    bos = BYTES.bos_token_id
    assert causal().encode("", "hello").prefix == [bos]
    assert causal().encode("The", " answer").prefix == []
    assert causal(bos="always").encode("The", " answer").prefix == [bos]
    assert causal(bos="never").encode("", "hello world").prefix == []
    # A token that straddles the very beginning has nothing before it: BOS is needed although there is a prompt.
    first = causal().encode("hel", "lo world")
    assert first.pieces[0] == "hello"
    assert (first.boundary, first.start, first.prefix) == ("straddled", 0, [bos])


def test_bos_that_the_tokenizer_adds_is_kept_and_never_doubled():
    encoder = causal(LLAMA)
    assert encoder.adds_bos
    assert encoder.encode("The", " answer").prefix == [LLAMA.bos_token_id]
    again = encoder.encode("<s>The", " answer")
    assert again.prefix == []
    assert again.content.count(LLAMA.bos_token_id) == 1
    assert causal(LLAMA, bos="never").encode("The", " answer").prefix == []
    assert "adds it" in encoder.describe_bos()


def test_bos_does_not_depend_on_the_other_rows():
    """lm-evaluation-harness decides BOS for a batch from its first string."""
    encoder = causal(LLAMA)
    plain = encoder.encode("The", " answer")
    encoder.encode("<s>The", " answer")
    assert encoder.encode("The", " answer") == plain


def test_without_bos_the_first_token_is_reported_as_unscored():
    text = causal(NO_BOS).encode("", "hello world")
    assert (text.prefix, text.start, text.scored_from) == ([], 0, 1)
    assert text.num_bytes == len("hello world") - len(text.pieces[0])
    with pytest.raises(RowError, match="only token has nothing before it"):
        causal(NO_BOS).encode("", "hello")
    with pytest.raises(InputError, match="no BOS token"):
        causal(NO_BOS, bos="always")


def test_bytes_of_a_character_cut_in_two():
    """An unscored first token that is part of a character leaves the character's other bytes to be scored."""
    text = causal(NO_BOS).encode("", "漣x")
    assert len(text.content) > 2
    assert text.pieces[:2] == ["漣", ""]
    assert "".join(text.pieces) == "漣x"
    total = len("漣x".encode())
    first = len(NO_BOS.convert_ids_to_tokens(text.content[0]))
    assert text.num_bytes == total - first


def test_pad_token_equal_to_eos_is_an_ordinary_token():
    """minicons drops ids equal to pad (= EOS on GPT-2) from the prompt; here only masks say what is padding."""
    text = causal().encode("a<|endoftext|>b", " yes")
    assert text.content.count(BYTES.eos_token_id) == 1
    assert text.start == len(text.content) - 1


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, BERT, T5], ids=["bytes", "llama", "bert", "t5"])
def test_pieces_cover_the_text(tokenizer):
    layout = "masked" if tokenizer is BERT else "causal"
    text = TextEncoder(tokenizer, layout=layout, bos="never").encode("hello", " world the answer")
    joined = "".join(text.pieces)
    if tokenizer is BERT:
        assert joined == "helloworldtheanswer"
    else:
        assert joined == "hello world the answer"


def test_masked_layout_keeps_special_tokens_out_of_the_score():
    text = TextEncoder(BERT, layout="masked").encode("hel", "lo")
    assert text.prefix == [BERT.cls_token_id]
    assert text.suffix == [BERT.sep_token_id]
    assert text.pieces == ["hello"]
    assert (text.boundary, text.num_bytes) == ("straddled", 5)
    spaced = TextEncoder(BERT, layout="masked").encode("hello ", "world")
    assert spaced.boundary == "aligned"
    assert spaced.num_bytes == 5


def test_seq2seq_layout_ends_source_and_target():
    text = TextEncoder(T5, layout="seq2seq").encode("hello", "the answer")
    end = T5.eos_token_id
    assert text.content[text.start - 1] == end
    assert text.content[-1] == end
    assert text.content[: text.start] == T5("hello")["input_ids"]
    assert text.content[text.start :] == T5(text_target="the answer")["input_ids"]
    assert text.boundary == "separate"
    assert text.num_bytes == len("the answer")


def test_unknown_tokens_are_noticed_in_the_completion_only():
    encoder = TextEncoder(BERT, layout="masked")
    assert encoder.encode("hello ", "\u2603").has_unknown
    assert not encoder.encode("\u2603 ", "hello").has_unknown


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("a", "", "the completion is empty"),
        ("a", "b\ud800", "the completion has a lone surrogate \\(U\\+D800\\) at character 1"),
        ("a\0", "b", "the prompt has a NUL character at character 1"),
        ("é\0", "b", "the prompt has a NUL character at character 1"),
    ],
)
def test_text_that_no_tokenizer_can_represent(prompt, completion, message):
    with pytest.raises(RowError, match=message):
        causal().encode(prompt, completion)


def test_completion_that_vanishes_under_the_tokenizer():
    with pytest.raises(RowError, match="no token under this tokenizer"):
        TextEncoder(BERT, layout="masked").encode("hello", "  ")


def test_missing_tokenizer_is_one_sentence():
    with pytest.raises(InputError, match="no tokenizer"):
        TextEncoder(None, layout="causal")
