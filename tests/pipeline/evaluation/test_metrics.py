"""A student's metrics against a dense reference in float64, on tables of whole distributions, samples, or heads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softlabel.pipeline.evaluation.metrics import measure
from softlabel.pipeline.loss.targets import CompactTargets
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.stream.batch import Batch
from softlabel.storage.codec import encode
from softlabel.storage.schema import SOFT_LABELS

V, PADDED = 61, 64
LENGTHS = ((12, 20), (31,))  # sequences of each training row; the rest of a row is padding
L = 32


def selection(**changes):
    everything = Selection(top_p=1.0, min_k=V, max_k=V, draws=0, temperatures=(1.0,), seed=0)
    return replace(everything, **changes)


def model(seed, **config):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=PADDED, initializer_range=0.3, **shape, **config)
    return LlamaForCausalLM(settings).eval()


@pytest.fixture(scope="module")
def sequences():
    torch.manual_seed(1)
    return [[torch.randint(V, (length,)) for length in row] for row in LENGTHS]


@pytest.fixture(scope="module")
def teacher():
    return model(2)


@pytest.fixture(scope="module")
def student():
    return model(3)


def dense(network, sequences):
    """(N, V) float64 log-probabilities of each token after a sequence's first, one sequence at a time."""
    logits = [network(ids[None], use_cache=False).logits[0, :-1, :V] for row in sequences for ids in row]
    return torch.cat(logits).detach().double().log_softmax(1)


def following(sequences):
    return torch.cat([ids[1:] for row in sequences for ids in row])


def table(chosen):
    vocabulary = np.random.default_rng(0).permutation(V).astype(np.int32)
    return SimpleNamespace(vocabulary=vocabulary, temperatures=chosen.temperatures, draws=chosen.draws > 0)


def batch(sequences, labels, table):
    input_ids, position_ids = torch.zeros(2, len(LENGTHS), L, dtype=torch.int64)
    positions = []
    for number, row in enumerate(sequences):
        start = 0
        for ids in row:
            input_ids[number, start : start + len(ids)] = ids
            position_ids[number, start : start + len(ids)] = torch.arange(len(ids))
            positions.append(number * L + start + torch.arange(len(ids) - 1))
            start += len(ids)
        position_ids[number, start:] = torch.arange(L - start)
    ranks = np.argsort(table.vocabulary).astype(np.int32)
    columns = encode(labels, np.array([labels.positions]), ranks)
    flat = {name: torch.from_numpy(columns[name].chunk(0).flatten().to_numpy().copy()) for name in SOFT_LABELS.names}
    flat["tail_log_masses"] = flat["tail_log_masses"].reshape(labels.positions, -1).T
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        positions=torch.cat(positions),
        next_ids=following(sequences),
        targets=CompactTargets(**flat),
        sequences=sum(map(len, LENGTHS)),
        global_positions=labels.positions,
    )


def measured(student, teacher_logprobs, sequences, chosen, seed=0):
    """Metrics from a capture of these log-probabilities."""
    count = len(teacher_logprobs)
    seeds = torch.arange(count) + 1000 * seed
    labels = select(teacher_logprobs.float(), following(sequences), seeds, chosen, V)
    store = table(chosen)
    return measure(student, [batch(sequences, labels, store)], store)


def reference(student, teacher, sequences):
    """(N,) forward KL, cross-entropy, agreement, teacher's cross-entropy and entropy, dense in float64."""
    t, s, following_ids = dense(teacher, sequences), dense(student, sequences), following(sequences)[:, None]
    return {
        "kl": (t.exp() * (t - s)).sum(1),
        "cross_entropy": -s.gather(1, following_ids)[:, 0],
        "agreement": (t.argmax(1) == s.argmax(1)).double(),
        "teacher_cross_entropy": -t.gather(1, following_ids)[:, 0],
        "teacher_entropy": -(t.exp() * t).sum(1),
    }


def test_a_table_of_whole_distributions_gives_the_dense_metrics(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    for name, values in reference(student, teacher, sequences).items():
        assert getattr(metrics, name).mean == pytest.approx(float(values.mean()), abs=2e-3), name
    assert metrics.kl_kind == "unbiased"
    assert (metrics.sequences, metrics.positions) == (3, 60)


def test_the_teacher_has_zero_kl_from_itself(teacher, sequences):
    metrics = measured(teacher, dense(teacher, sequences), sequences, selection())
    assert metrics.kl.mean == pytest.approx(0, abs=1e-4)
    assert metrics.agreement.mean == 1
    assert metrics.cross_entropy.mean == pytest.approx(metrics.teacher_cross_entropy.mean, abs=1e-3)


def test_the_sampled_tail_is_unbiased(student, teacher, sequences):
    chosen, t = selection(top_p=0.8, min_k=1, max_k=4, draws=8), dense(teacher, sequences)
    means = torch.tensor([measured(student, t, sequences, chosen, seed).kl.mean for seed in range(30)])
    truth = float(reference(student, teacher, sequences)["kl"].mean())
    assert means.std() > 0
    assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / 30**0.5 + 2e-3


def test_without_draws_the_kl_is_a_lower_bound(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection(min_k=4, max_k=4))
    t, s = dense(teacher, sequences), dense(student, sequences)
    ids = t.topk(4).indices
    head_t, head_s = t.gather(1, ids), s.gather(1, ids)
    rest_t, rest_s = (-torch.expm1(head.logsumexp(1)) for head in (head_t, head_s))
    bound = (head_t.exp() * (head_t - head_s)).sum(1) + rest_t * (rest_t / rest_s).log()
    assert metrics.kl_kind == "lower bound"
    assert metrics.kl.mean == pytest.approx(float(bound.mean()), abs=2e-3)
    assert metrics.kl.mean < float(reference(student, teacher, sequences)["kl"].mean())


def test_a_tiny_bucket_gives_an_exact_kl_in_float32(teacher, sequences):
    """For a student that is sure of the kept ids, 1 - Σ s in float32 would be 0 or wrong by nats."""
    sure = model(2)
    sure.model.norm.weight.data *= 8
    t, s = dense(teacher, sequences), dense(sure, sequences)
    ids = t.topk(4).indices
    head_t, head_s = t.gather(1, ids), s.gather(1, ids)
    rest_t, rest_s = (p.scatter(1, ids, -torch.inf).logsumexp(1) for p in (t, s))
    assert rest_s.min() < -20
    expected = (head_t.exp() * (head_t - head_s)).sum(1) + rest_t.exp() * (rest_t - rest_s)
    metrics = measured(sure, t, sequences, selection(min_k=4, max_k=4))
    assert metrics.kl.mean == pytest.approx(float(expected.mean()), rel=2e-3)


def test_without_a_head_agreement_is_none(student, teacher, sequences):
    chosen = selection(top_p=0.5, min_k=0, max_k=0, draws=40)
    metrics = measured(student, dense(teacher, sequences), sequences, chosen)
    assert metrics.agreement is None
    assert metrics.kl.mean == pytest.approx(float(reference(student, teacher, sequences)["kl"].mean()), rel=0.2)


def test_standard_errors_treat_sequences_as_independent(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    values = reference(student, teacher, sequences)["cross_entropy"]
    lengths = [len(ids) - 1 for row in sequences for ids in row]
    sums = torch.stack([part.sum() for part in values.split(lengths)])
    residuals = sums - values.mean() * torch.tensor(lengths)
    expected = (residuals.square().sum() * 3 / 2).sqrt() / 60
    assert metrics.cross_entropy.error == pytest.approx(float(expected), abs=1e-3)


def test_bins_of_entropy_hold_every_position_once(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    bins = metrics.by_entropy
    assert sum(entry.positions for entry in bins) == metrics.positions
    weighted = sum(entry.kl * entry.positions for entry in bins) / metrics.positions
    assert weighted == pytest.approx(metrics.kl.mean, abs=1e-6)
    assert [entry.low for entry in bins] == sorted(entry.low for entry in bins)
    entropies = reference(student, teacher, sequences)["teacher_entropy"]
    first = bins[0]
    assert first.positions == pytest.approx(int(((entropies >= first.low) & (entropies < first.high)).sum()), abs=1)


def test_soft_cap_and_scale_of_the_model_are_applied(teacher, sequences):
    """Gemma caps its logits after the output layer; padding rows are ignored."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=PADDED,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        final_logit_softcapping=2.0,
        **shape,
    )
    capped = Gemma2ForCausalLM(config).eval()
    metrics = measured(capped, dense(teacher, sequences), sequences, selection())
    expected = reference(capped, teacher, sequences)
    assert metrics.kl.mean == pytest.approx(float(expected["kl"].mean()), abs=2e-3)
    assert metrics.cross_entropy.mean == pytest.approx(float(expected["cross_entropy"].mean()), abs=2e-3)


def test_the_models_training_mode_is_restored(student, teacher, sequences):
    t = dense(teacher, sequences)
    student.train()
    measured(student, t, sequences, selection())
    assert student.training
    student.eval()
