"""Scores against torch in float64, and what must hold exactly."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqnfx.errors import InputError, ProbeError
from aqnfx.probes import tasks
from aqnfx.probes.data.batches import Encoded, make_batches
from aqnfx.probes.tasks import accuracy_like, reference, score

VOCAB = 11


def sample_batch(fixed_length=None, answers=True, batch_size=4):
    rows = (
        Encoded(input_ids=(1, 2, 3, 4, 5), score_from=1),
        Encoded(input_ids=(1, 9, 8), score_from=2, answer=(2, 3) if answers else None),
        Encoded(input_ids=(7, 7, 6, 5, 4, 3), score_from=3, answer=(3, 5) if answers else None),
    )
    return next(iter(make_batches(rows, batch_size=batch_size, pad_id=0, fixed_length=fixed_length)))


def logits_for(batch, seed=0, scale=2.0, dtype=torch.float32, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*batch.input_ids.shape, vocab, generator=generator)).to(dtype)


def expected(batch, clean, noisy):
    """The textbook formulas, one position at a time, in float64."""
    out = {key: np.zeros(batch.size) for key in ("kl", "nll", "top1", "exact_match")}
    out["exact_match"][:] = np.nan
    for row in range(batch.size):
        for t in batch.score_mask[row].nonzero().flatten().tolist():
            p = torch.log_softmax(clean[row, t].double(), dim=-1)
            q = torch.log_softmax(noisy[row, t].double(), dim=-1)
            label = int(batch.input_ids[row, t + 1])
            out["kl"][row] += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
            out["nll"][row] -= float(q[label])
            out["top1"][row] += float(p.argmax() == q.argmax())
        where = [] if batch.answer_mask is None else batch.answer_mask[row].nonzero().flatten().tolist()
        if where:
            hits = [int(noisy[row, t].argmax()) == int(batch.input_ids[row, t + 1]) for t in where]
            out["exact_match"][row] = float(all(hits))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_scores_are_those_of_the_textbook(dtype, noise):
    batch = sample_batch()
    clean = logits_for(batch, dtype=dtype)
    noisy = (clean.double() + noise * logits_for(batch, seed=1, dtype=torch.float64)).to(dtype)
    made, own = reference(batch, clean)
    found, want = score(made, noisy), expected(batch, clean, noisy)
    assert set(found) == set(want)
    for key, values in want.items():
        assert found[key].dtype == np.float64
        np.testing.assert_allclose(found[key], values, rtol=2e-5, atol=1e-12 if key == "kl" else 1e-6, err_msg=key)
    for key, values in expected(batch, clean, clean).items():
        np.testing.assert_allclose(own[key], values, rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_score_exactly_as_the_clean_run(dtype):
    batch = sample_batch()
    clean = logits_for(batch, scale=20.0, dtype=dtype)
    made, own = reference(batch, clean)
    again = score(made, clean.clone())
    assert again["kl"].tolist() == [0.0, 0.0, 0.0]
    assert again["top1"].tolist() == [4.0, 1.0, 3.0]
    for key, values in own.items():
        np.testing.assert_array_equal(again[key], values)


@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3])
def test_tiny_divergences_keep_their_digits(noise):
    batch = sample_batch()
    vocab = 2000
    clean = logits_for(batch, scale=3.0, vocab=vocab)
    noisy = clean + noise * logits_for(batch, seed=1, scale=1.0, vocab=vocab)
    found = score(reference(batch, clean)[0], noisy)["kl"]
    want = expected(batch, clean, noisy)["kl"]
    assert want.max() < 1e-5
    np.testing.assert_allclose(found, want, rtol=5e-3)


def test_a_shift_of_all_logits_costs_nothing():
    batch = sample_batch()
    clean = logits_for(batch)
    made, own = reference(batch, clean)
    found = score(made, clean + 64.0)
    assert (found["kl"] < 1e-9).all()
    np.testing.assert_allclose(found["nll"], own["nll"], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.01, 300), noise=st.floats(0.0, 300), seed=st.integers(0, 99))
def test_divergence_is_never_negative_and_right_at_any_size(scale, noise, seed):
    batch = sample_batch()
    clean = logits_for(batch, seed=seed, scale=scale)
    noisy = clean + noise * logits_for(batch, seed=seed + 1)
    found, want = score(reference(batch, clean)[0], noisy), expected(batch, clean, noisy)
    assert (found["kl"] >= 0).all()
    # The clean probabilities are float32: relative 1e-7 times the logit that they exponentiate.
    np.testing.assert_allclose(found["kl"], want["kl"], rtol=2e-3, atol=1e-6 * (1 + noise))
    np.testing.assert_allclose(found["nll"], want["nll"], rtol=1e-4, atol=1e-6 * (1 + noise + scale))


def test_huge_and_opposite_logits_stay_finite():
    batch = sample_batch(answers=False)
    clean, noisy = torch.zeros(3, 6, VOCAB), torch.zeros(3, 6, VOCAB)
    clean[..., 0], noisy[..., 1] = 3e38, 3e38
    noisy[..., 0] = -3e38
    found = score(reference(batch, clean)[0], noisy)
    assert np.isfinite(found["kl"]).all()
    assert (found["kl"] > 1e38).all()


def test_exact_match_needs_every_answer_token():
    batch = sample_batch()
    clean = torch.zeros(3, 6, VOCAB)
    clean.scatter_(-1, batch.input_ids.roll(-1, 1)[..., None], 5.0)  # predicts every next token
    made, own = reference(batch, clean)
    np.testing.assert_array_equal(own["exact_match"], [math.nan, 1.0, 1.0])
    noisy = clean.clone()
    noisy[2, 3, 10] = 9.0  # the second of two answer tokens
    np.testing.assert_array_equal(score(made, noisy)["exact_match"], [math.nan, 1.0, 0.0])
    noisy = clean.clone()
    noisy[2, 4, 10] = 9.0  # scored, but after the answer
    found = score(made, noisy)
    np.testing.assert_array_equal(found["exact_match"], [math.nan, 1.0, 1.0])
    assert found["top1"].tolist() == [4.0, 1.0, 2.0]


def test_without_answers_there_is_no_exact_match():
    batch = sample_batch(answers=False)
    made, own = reference(batch, logits_for(batch))
    assert set(own) == set(score(made, logits_for(batch, 1))) == {"kl", "nll", "top1"}


def test_dummy_rows_and_padding_are_never_looked_at():
    plain, padded = sample_batch(), sample_batch(fixed_length=9, batch_size=5)
    clean, noisy = logits_for(plain), logits_for(plain, 1)
    wide = [torch.full((5, 9, VOCAB), math.nan) for _ in range(2)]
    for target, source in zip(wide, (clean, noisy), strict=True):
        target[:3, :6] = source
        target[~torch.nn.functional.pad(padded.score_mask, (0, 1))] = math.nan
    found, want = score(reference(padded, wide[0])[0], wide[1]), score(reference(plain, clean)[0], noisy)
    for key, values in want.items():
        np.testing.assert_array_equal(found[key], values)


def test_chunks_do_not_change_the_scores(monkeypatch):
    batch = sample_batch()
    clean, noisy = logits_for(batch), logits_for(batch, 1)
    whole = score(reference(batch, clean)[0], noisy)
    monkeypatch.setattr(tasks, "_CHUNK_CPU", 3 * VOCAB)
    for key, values in score(reference(batch, clean)[0], noisy).items():
        np.testing.assert_array_equal(values, whole[key])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_sample(value):
    rows = [Encoded(input_ids=(1, 2, 3), score_from=1)] * 4
    _, batch = make_batches(rows, batch_size=2, pad_id=0)
    clean = logits_for(batch)
    broken = clean.clone()
    broken[1, 0, 4] = value
    with pytest.raises(ProbeError, match=r"not finite at 1 scored positions of sample 3; lower the noise level"):
        score(reference(batch, clean)[0], broken)
    with pytest.raises(ProbeError, match="of sample 3;"):
        reference(batch, broken)
    _, moved = make_batches([dataclasses.replace(rows[0], number=9 - i) for i in range(4)], batch_size=2, pad_id=0)
    with pytest.raises(ProbeError, match="of sample 6;"):  # by its place in the data
        reference(moved, broken)


def test_shapes_that_do_not_fit_are_refused():
    batch = sample_batch()
    clean = logits_for(batch)
    with pytest.raises(ProbeError, match=r"shape \(3, 5, 11\).*\(3, 6, vocabulary\)"):
        reference(batch, clean[:, :-1])
    with pytest.raises(ProbeError, match="perturbed logits have shape"):
        score(reference(batch, clean)[0], clean[..., :-1])


def test_accuracy_like():
    assert accuracy_like("exact_match", True) == "exact_match"
    assert [accuracy_like(task, False) for task in ("kl", "nll", "top1_agreement")] == ["top1"] * 3
    with pytest.raises(InputError, match="needs examples with 'question'"):
        accuracy_like("exact_match", False)
    with pytest.raises(InputError, match=r"unknown task 'exact-match'.*did you mean 'exact_match'"):
        accuracy_like("exact-match", True)
