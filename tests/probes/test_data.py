"""Reading files, encoding with real tokenizers built in the test, and batches of one shape."""

import gzip
import json
import os
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aqnfx.errors import InputError
from aqnfx.probes.data import tokens
from aqnfx.probes.data.batches import (
    DataWarning,
    Encoded,
    Example,
    by_length,
    data_digest,
    encode,
    load_examples,
    make_batches,
)

SEPARATED = "one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n\n"


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tokenizer(template=None, merges=()):
    """A character tokenizer with the ids of ASCII; ``merges`` adds two-character pieces, ``template`` specials."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {chr(c): c - 28 for c in range(32, 127)}
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.Sequence([])
    if template:
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def question(q="1+1?", a="2"):
    prompt, answer = f"Q: {q}\nA: ", f"{a}\n"
    return Example(text=prompt + answer, prompt=prompt, answer=answer)


# --- load_examples ----------------------------------------------------------------------------------------------------


def test_jsonl_text_and_questions(tmp_path):
    path = write(
        tmp_path, "a.jsonl", "\ufeff" + jsonl({"text": "a\u2028b"}, {"question": "1+1?", "answer": "2"}) + "\n"
    )
    assert load_examples(path) == (Example(text="a\u2028b"), question())


def test_jsonl_text_field_and_limit_reads_no_further(tmp_path):
    path = write(tmp_path, "a.json", jsonl({"body": "x", "text": "y"}, {"body": "z"}) + "not json\n")
    assert load_examples(path, text_field="body", limit=2) == (Example(text="x"), Example(text="z"))
    with pytest.raises(InputError, match=r"a\.json:3: is not valid JSON"):
        load_examples(path, text_field="body")


def test_blank_examples_are_left_out_and_do_not_count(tmp_path):
    path = write(tmp_path, "a.jsonl", jsonl({"text": " \n"}, {"text": "a"}, {"text": ""}, {"text": "b"}))
    assert [e.text for e in load_examples(path, limit=2)] == ["a", "b"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"question": ["1+1?", "2+2?"], "answer": ["2", "4"], "other": [1, 2]})
    pq.write_table(table, path)
    assert load_examples(path) == (question(), question("2+2?", "4"))
    assert [e.text for e in load_examples(path, text_field="answer", limit=1)] == ["2"]


def test_tables(tmp_path):
    rows = 'id,question,answer\r\n1,"1+1?",2\r\n\r\n2,"a ""b"",\nc",4\r\n'
    assert load_examples(write(tmp_path, "a.csv", "\ufeff" + rows)) == (question(), question('a "b",\nc', "4"))
    tabs = write(tmp_path, "a.tsv", "id\tbody\n1\tx, y\n2\tz")
    assert [e.text for e in load_examples(tabs, text_field="body")] == ["x, y", "z"]
    long = "x" * 200_000  # more than the csv module takes by itself
    assert load_examples(write(tmp_path, "b.csv", f"text\n{long}\n"))[0].text == long


def test_ndjson_is_json_lines(tmp_path):
    path = write(tmp_path, "a.NDJSON", jsonl({"text": "\u0000 in a string is text"}))
    assert load_examples(path) == (Example(text="\0 in a string is text"),)


def test_lines_without_end_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("aqnfx.probes.data.files._LONGEST", 8)
    path = write(tmp_path, "a.txt", "äöüäöüäöü\nb\n\nabc")
    assert [e.text for e in load_examples(path)] == ["äöüä", "öüäö", "ü\nb", "abc"]
    three = write(tmp_path, "b.txt", "1234567€\n")  # the piece ends inside a character of three bytes
    assert [e.text for e in load_examples(three)] == ["1234567€"]
    with pytest.raises(InputError, match=r"c\.jsonl:1: is longer than"):
        load_examples(write(tmp_path, "c.jsonl", jsonl({"text": "abc"})))


def test_pipes_and_devices_are_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path in (tmp_path / "fifo.jsonl", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or a device"):
            load_examples(path)
    with pytest.raises(InputError, match=r"cannot be read|no such file"):
        load_examples("x" * 5000)
    with pytest.raises(InputError, match="no such file"):
        load_examples("a\0b")


def test_plain_text(tmp_path):
    assert [e.text for e in load_examples(write(tmp_path, "a.txt", SEPARATED))] == ["one\n\nstill one", "two"]
    blank = write(tmp_path, "b.md", "one\r\nmore\r\n \r\n\r\ntwo\n\n")
    assert [e.text for e in load_examples(blank)] == ["one\nmore", "two"]
    assert [e.text for e in load_examples(blank, limit=1)] == ["one\nmore"]


def test_a_limit_reads_no_further_than_the_first_lines_of_text(tmp_path):
    path = write(tmp_path, "a.txt", b"x\n\n" * 20_000 + b"\xff\xff\n")
    assert len(load_examples(path, limit=5)) == 5
    with pytest.raises(InputError, match=r"a\.txt:40001: is not UTF-8"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "", {}, "is empty"),
        ("a.txt", " \n\n", {}, "no usable example"),
        ("a.txt", b"ok\n\xff\xfe\n", {}, r"a\.txt:2: is not UTF-8"),
        ("a.txt", "x", {"text_field": "body"}, "plain text and has no field 'body'"),
        ("a.txt", "x", {"limit": 0}, "limit must be at least 1"),
        ("a.jsonl", "\n\n", {}, "no usable example"),
        ("a.jsonl", jsonl({"text": ""}), {}, "no usable example"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, r"a\.jsonl:2: is not valid JSON"),
        ("a.jsonl", "[" * 100_000, {}, r"a\.jsonl:1: is not valid JSON"),
        ("a.jsonl", '[{"text": "a"}]', {}, "found a list"),
        ("a.jsonl", b'{"text": "\xff"}', {}, r"a\.jsonl:1: is not UTF-8"),
        ("a.jsonl", jsonl({"body": "a", "id": 1}), {}, "no field 'text'.*found 'body', 'id'"),
        ("a.jsonl", jsonl({}), {}, "found no fields"),
        ("a.jsonl", jsonl({"question": "a"}), {}, "no field 'answer'; found 'question'"),
        ("a.jsonl", jsonl({"text": "a"}), {"text_field": "texts"}, "did you mean 'text'"),
        ("a.jsonl", jsonl({"text": "a"}, {"text": 3}), {}, r"a\.jsonl:2: field 'text' must be a string, found int"),
        ("a.jsonl", jsonl({"question": "a", "answer": None}), {}, "found NoneType"),
        ("a.parquet", "not parquet at all", {}, "not a readable parquet file"),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", {}, r"a\.jsonl:1: is not valid JSON"),
        ("a.jsonl", '{"text": "ab\\udfff"}', {}, r"a\.jsonl:1: field 'text': character 2 is .*half of a surrogate pair"),
        ("a.json", "[\n", {}, r"a\.json:1: .* write each element of an array on its own line"),
        ("a.txt", b"ok\nN\0U\0L\n", {}, r"a\.txt:2: holds a NUL byte"),
        ("a.txt", "ok".encode("utf-16"), {}, "is UTF-16 text; convert it"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), {}, "is compressed with gzip; unpack it"),
        ("a.txt", b"PAR1....", {}, "name it .parquet"),
        ("a.csv", "a,b\n1,2\n", {}, "no field 'text'.*found 'a', 'b'"),
        ("a.csv", "text,b\nx\n", {}, r"a\.csv:2: has 1 fields, and the first row names 2"),
        ("a.csv", "text,text\nx,y\n", {}, "names a column twice"),
        ("a.csv", 'text\n"open\n', {}, "is not a valid table .*quotes"),
        ("a.tsv", "text\n", {}, "no usable example"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, options, message):
    with pytest.raises(InputError, match=message):
        load_examples(write(tmp_path, name, content), **options)


def test_missing_files_directories_and_parquet_fields_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_examples(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a directory"):
        load_examples(tmp_path)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(InputError, match=r"no field 'text'.*found 'body', 'n'"):
        load_examples(path)
    with pytest.raises(InputError, match=r"no field 'bdy'.*did you mean 'body'"):
        load_examples(path, text_field="bdy")
    with pytest.raises(InputError, match="row 2: field 'body' must be a string, found NoneType"):
        load_examples(path, text_field="body")


def test_examples_check_themselves():
    with pytest.raises(ValueError, match="or neither"):
        Example(text="a", prompt="a")
    with pytest.raises(ValueError, match=r"prompt \+ answer"):
        Example(text="a", prompt="b", answer="c")


# --- encode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("merges", [(), ((" ", "2"),)])
def test_the_answer_is_found_whatever_the_tokenizer_adds_or_merges(template, merges):
    tok = tokenizer(template, merges)
    (encoded,) = encode([question()], tok, max_length=64)
    assert tok.convert_ids_to_tokens(list(encoded.input_ids[slice(*encoded.answer)])) == (
        [" 2", "\n"] if merges else ["2", "\n"]
    )
    assert encoded.score_from == encoded.answer[0]
    assert not encoded.truncated


def test_without_offsets_the_common_prefix_is_taken(monkeypatch):
    tok = tokenizer("<s> $A </s>", ((" ", "2"),))
    with_offsets = encode([question()], tok, max_length=64)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert encode([question()], tok, max_length=64) == with_offsets


def test_texts_score_all_but_the_first_token():
    (encoded,) = encode([Example(text="abcdef")], tokenizer("<s> $A"), max_length=4)
    assert encoded == Encoded(input_ids=(1, 69, 70, 71), score_from=1, truncated=True)


def test_what_is_cut_off_is_counted():
    examples = [question(), question(a="2" * 30), question(q="1" * 40)]
    with pytest.warns(DataWarning, match="1 of 3 samples .*max_length=20.*; 1 more had their answer cut off"):
        whole, cut = encode(examples, tokenizer(), max_length=20)
    assert whole.answer == (11, 13)
    assert cut.answer is None
    assert (cut.score_from, len(cut.input_ids), cut.truncated) == (11, 20, True)


def test_an_empty_prompt_without_a_start_token_scores_from_the_second_token():
    (encoded,) = encode([Example(text="ab", prompt="", answer="ab")], tokenizer(), max_length=8)
    assert encoded.answer == (1, 2)


def test_pack_loses_nothing_and_pads_nothing():
    tok = tokenizer("<s> $A")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = encode([Example(text="abc"), Example(text="defgh")], tok, max_length=4, pack=True)
    assert [len(e.input_ids) for e in encoded] == [4, 4, 2]
    assert tok.decode([i for e in encoded for i in e.input_ids]).replace(" ", "") == "<s>abc<s>defgh"


@pytest.mark.parametrize(
    ("template", "text", "pieces"),
    [
        ("<s> $A", "<s>abc", "<s>abc"),
        ("<s> $A </s>", "<s>abc</s>", "<s>abc</s>"),
        ("$A </s>", "<s>abc</s>", "<s>abc</s>"),
        ("<s> $A </s>", "abc", "<s>abc</s>"),
        (None, "<s><s>abc</s></s>", "<s><s>abc</s></s>"),  # the tokenizer adds nothing: the text is what it is
        ("<s> $A", "ab<s>", "<s>ab<s>"),
    ],
)
def test_special_tokens_of_a_text_are_not_added_again(template, text, pieces):
    tok = tokenizer(template)
    for pack in (False, True):
        (encoded,) = encode([Example(text=text)], tok, max_length=64, pack=pack)
        assert "".join(tok.convert_ids_to_tokens(list(encoded.input_ids))) == pieces


def test_special_tokens_of_a_prompt_are_not_added_again():
    tok = tokenizer("<s> $A </s>", ((":", "2"),))
    (encoded,) = encode([Example(text="<s>ab:2</s>", prompt="<s>ab:", answer="2</s>")], tok, max_length=64)
    assert tok.convert_ids_to_tokens(list(encoded.input_ids)) == ["<s>", "a", "b", ":2", "</s>"]
    assert encoded.answer == (3, 5)


def test_of_a_long_text_only_the_beginning_is_tokenised(monkeypatch):
    called = []

    def call(tok, text, **options):
        called.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return tokens_call(tok, text, **options)

    tokens_call = tokens._call
    monkeypatch.setattr(tokens, "_call", call)
    text, tok = "one two three " * 100_000, tokenizer("<s> $A </s>", (("o", "n"), ("t", "h")))
    whole = tok(text)["input_ids"]
    for pack in (False, True):
        found = encode([Example(text=text)] * 3, tok, max_length=64, pack=pack, limit=3)
        assert [row.input_ids for row in found] == [tuple(whole[64 * i * pack :][:64]) for i in range(3)]
        assert [row.truncated for row in found] == [not pack] * 3
    assert sum(called) < len(text)
    # One token of all the text: nothing is settled before its end.
    monkeypatch.setattr(tokens, "_WHOLE", 64)
    word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a" * 1000: 5, "?": 0}, unk_token="?")))
    assert tokens.Tokens(word).joined(["a" * 1000], 4) == [5]


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {"max_length": 8}, "no examples"),
        ([Example(text="abc")], {"max_length": 1}, "max_length"),
        ([Example(text="a")], {"max_length": 8}, "none of the 1 examples"),
        ([question()], {"max_length": 5}, "none of the 1 examples"),
        ([question()], {"max_length": 64, "pack": True}, "cannot be packed"),
    ],
)
def test_nothing_to_encode_is_refused(examples, options, message):
    with pytest.raises(InputError, match=message):
        encode(examples, tokenizer(), **options)


def test_encoded_checks_itself():
    with pytest.raises(ValueError, match="nothing to score"):
        Encoded(input_ids=(1, 2), score_from=2)
    with pytest.raises(ValueError, match="nothing to score"):
        Encoded(input_ids=(1, 2), score_from=0)
    with pytest.raises(ValueError, match="outside"):
        Encoded(input_ids=(1, 2, 3), score_from=2, answer=(1, 3))


# --- batches ----------------------------------------------------------------------------------------------------

ROWS = (
    Encoded(input_ids=(5, 6, 7), score_from=1),
    Encoded(input_ids=(5, 6, 7, 8, 9), score_from=3, answer=(3, 5)),
    Encoded(input_ids=(4, 3), score_from=1),
)


def test_batches_pad_to_the_right_and_mark_what_is_predicted():
    first, last = make_batches(ROWS, batch_size=2, pad_id=0)
    assert first.input_ids.tolist() == [[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]]
    assert first.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert first.score_mask.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert first.answer_mask.tolist() == [[False] * 4, [False, False, True, True]]
    assert (first.row_offset, first.size, last.row_offset, last.size) == (0, 2, 2, 1)
    assert last.input_ids.tolist() == [[4, 3]]
    assert last.answer_mask.tolist() == [[False]]  # no answer here, but there is one in the data


def test_a_fixed_length_gives_one_shape_and_dummy_rows_score_nothing():
    first, last = make_batches(ROWS, batch_size=2, pad_id=9, fixed_length=6)
    assert first.input_ids.shape == last.input_ids.shape == (2, 6)
    assert (last.row_offset, last.size) == (2, 1)
    assert last.input_ids.tolist() == [[4, 3, 9, 9, 9, 9]] * 2
    assert last.attention_mask.sum(dim=1).tolist() == [2, 2]
    assert last.score_mask.sum(dim=1).tolist() == [1, 0]
    moved = last.to("cpu")
    assert torch.equal(moved.score_mask, last.score_mask)
    assert moved.input_ids.dtype == torch.int64


def test_samples_of_like_length_stand_together_and_keep_their_numbers():
    ordered = by_length(ROWS)
    assert [len(row.input_ids) for row in ordered] == [2, 3, 5]
    first, last = make_batches(ordered, batch_size=2, pad_id=0)
    assert (first.input_ids.shape, last.input_ids.shape) == ((2, 3), (1, 5))
    assert [first.number(0), first.number(1), last.number(0)] == [2, 0, 1]
    assert (first.row_offset, last.row_offset) == (0, 2)  # the noise of a sample goes by its place
    assert last.to("cpu").numbers == (1,)
    assert by_length(ordered) == ordered  # and not numbered anew
    assert data_digest(ordered) != data_digest(ROWS)


def test_batches_without_answers_have_no_answer_mask():
    (batch,) = make_batches((ROWS[0], ROWS[2]), batch_size=8, pad_id=0)
    assert batch.answer_mask is None
    assert batch.to("cpu").answer_mask is None


@given(st.lists(st.integers(2, 7), min_size=1, max_size=9), st.integers(1, 4), st.booleans())
def test_every_scored_token_lands_in_exactly_one_place(lengths, batch_size, fixed):
    rows = [Encoded(input_ids=tuple(range(10 * i, 10 * i + n)), score_from=1) for i, n in enumerate(lengths)]
    seen = []
    for batch in make_batches(rows, batch_size=batch_size, pad_id=999, fixed_length=7 if fixed else None):
        seen += batch.input_ids[:, 1:][batch.score_mask].tolist()
        assert not batch.score_mask[batch.size :].any()
    assert seen == [token for row in rows for token in row.input_ids[1:]]


def test_bad_batches_are_refused():
    for rows, size in (((), 2), (ROWS, 0)):
        with pytest.raises(InputError, match="at least 1"):
            make_batches(rows, batch_size=size, pad_id=0)
    with pytest.raises(InputError, match="5 tokens, more than fixed_length=4"):
        make_batches(ROWS, batch_size=2, pad_id=0, fixed_length=4)


def test_the_digest_sees_every_part_and_nothing_else():
    digests = {
        data_digest(rows)
        for rows in (
            ROWS,
            ROWS[:2],
            (ROWS[1], ROWS[0], ROWS[2]),
            (Encoded(input_ids=(5, 6, 8), score_from=1), *ROWS[1:]),
            (Encoded(input_ids=(5, 6, 7), score_from=2), *ROWS[1:]),
            (Encoded(input_ids=(5, 6, 7), score_from=1, answer=(1, 2)), *ROWS[1:]),
        )
    }
    assert len(digests) == 6
    assert data_digest(tuple(ROWS)) == data_digest(list(ROWS))
    assert data_digest(ROWS) == "f4070c227d76e315669f718ba1e95d69fe768e56b0dbe6e545e22bcd3ab0d961"  # saved with results
