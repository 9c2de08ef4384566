"""A student's metrics against a dense reference in float64, on tables of whole distributions, samples, or heads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softlabel.pipeline.evaluation.metrics import CONFIDENCE_BINS, DRAFT, empty_sums, means, measure
from softlabel.pipeline.evaluation.summary import Measurement
from softlabel.pipeline.loss.targets import CompactTargets
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.stream.batch import Batch
from softlabel.pipeline.stream.holdout import HeldOutBatch
from softlabel.storage.codec import encode
from softlabel.storage.errors import StudentError
from softlabel.storage.schema import SOFT_LABELS
from tests.numberings import random_numbering

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
    parts = [SimpleNamespace(identity=SimpleNamespace(derived_from=None))]
    return SimpleNamespace(numbering=random_numbering(V), temperatures=chosen.temperatures, tables=parts)


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
    columns = encode(labels, np.array([labels.positions]), table.numbering)
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


GROUPS = {"source": ("books", "web")}
SIZES = np.arange(V) % 4
"""Bytes of text of each token id."""


def measured(student, teacher_logprobs, sequences, chosen, seed=0):
    """Metrics from a capture of these log-probabilities: the first two sequences are one document."""
    count = len(teacher_logprobs)
    seeds = torch.arange(count) + 1000 * seed
    labels = select(teacher_logprobs.float(), following(sequences), seeds, chosen, V)
    store = table(chosen)
    made = batch(sequences, labels, store)
    lengths = [len(ids) - 1 for row in sequences for ids in row]
    held = HeldOutBatch(
        batch=made,
        sequence=np.repeat(np.arange(3), lengths),
        documents=("a", "a", "b"),
        groups={"source": np.array([0, 1, 1])},
        done=None,
    )
    sums = empty_sums(GROUPS)
    measure(student, [held], store, SIZES, sums)
    measurement = Measurement(sums, documents=20, average=False)
    metrics, teacher = measurement.metrics(3, 2, GROUPS), measurement.teacher(GROUPS)
    quick = means(student, [made], store)
    assert quick["cross_entropy"] == pytest.approx(metrics.cross_entropy.mean, rel=1e-6)
    assert quick["forward_kl"] == pytest.approx(metrics.kl.mean, abs=1e-6)
    more = {"teacher_cross_entropy": teacher.cross_entropy, "teacher_entropy": teacher.entropy}
    return SimpleNamespace(**vars(metrics), **more, teacher=teacher)


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


def groups_of(teacher, sequences):
    """(N,) bool by kind of group and name: the positions of each group, from what the groups stand for."""
    place = torch.cat([torch.arange(1, len(ids)) for row in sequences for ids in row])
    t = dense(teacher, sequences)
    entropy = -(t.exp() * t).sum(1)
    return {
        "by_position": {name: (place >= low) & (place <= high) for name, low, high in PLACES},
        "by_entropy": {f"{low / 2:g}-{(low + 1) / 2:g} nats": (entropy * 2).floor() == low for low in range(12)},
        "by_column": {"books": torch.arange(len(place)) < 11, "web": torch.arange(len(place)) >= 11},
    }


PLACES = (("1", 1, 1), ("2-3", 2, 3), ("4-7", 4, 7), ("8-15", 8, 15), ("16-31", 16, 31))


def dense_figures(student, teacher, sequences, here):
    """Each figure over some positions as its definition says, from whole distributions in float64."""
    t, s, ids = dense(teacher, sequences), dense(student, sequences), following(sequences)
    mixed, shared = torch.logaddexp(t, s) - np.log(2), torch.minimum(t.exp(), s.exp()).sum(1)
    lengths = [len(ids) - 1 for row in sequences for ids in row]
    steps = torch.full((len(ids),), torch.nan, dtype=torch.float64)
    for begin, part in zip(np.cumsum([0, *lengths]), shared.split(lengths), strict=False):
        for start in range(len(part) - DRAFT + 1):
            steps[begin + start] = 1 + part[start : start + DRAFT].cumprod(0).sum()
    confidence, guess = s.exp().max(1)
    bins = (confidence * CONFIDENCE_BINS).long()
    nats = -s.gather(1, ids[:, None])[:, 0]
    size = torch.from_numpy(SIZES)[ids].double()
    top = [logprobs.topk(5, 1).indices for logprobs in (t, s)]

    def ece(target):
        gaps = (confidence - target)[here]
        return sum(abs(float(gaps[bins[here] == number].sum())) for number in range(CONFIDENCE_BINS)) / len(gaps)

    each = {
        "cross_entropy": nats,
        "kl": (t.exp() * (t - s)).sum(1),
        "reverse_kl": (s.exp() * (s - t)).sum(1),
        "jsd": ((t.exp() * (t - mixed)).sum(1) + (s.exp() * (s - mixed)).sum(1)) / 2,
        "total_variation": 1 - shared,
        "acceptance": shared,
        "agreement": (t.argmax(1) == s.argmax(1)).double(),
        "top_agreement": (top[0][:, :, None] == top[1][:, None]).sum((1, 2)).double() / 5,
        "confidence": confidence,
        "correct": (guess == ids).double(),
    }
    found = {name: float(values[here].mean()) for name, values in each.items()}
    found |= {"perplexity": np.exp(found["cross_entropy"]), "tokens_per_step": float(steps[here].nanmean())}
    found["bits_per_byte"] = float(nats[here].sum() / np.log(2) / size[here].sum())
    found["ece"] = ece((guess == ids).double())
    found["ece_to_teacher"] = ece(t.exp().gather(1, guess[:, None])[:, 0])
    return found


def reported_groups(metrics):
    return {
        "by_position": {each.name: each for each in metrics.by_position},
        "by_entropy": {each.name: each for each in metrics.by_entropy},
        "by_column": {each.name: each for each in metrics.by_column["source"]},
    }


def assert_agrees(found, expected, where):
    for name, value in expected.items():
        reported = getattr(found.calibration, name) if name.startswith("ece") else getattr(found, name)
        if np.isnan(value):
            assert reported is None, (where, name)
        else:
            assert reported.mean == pytest.approx(value, rel=5e-3, abs=2e-3), (where, name)


def test_every_figure_of_all_positions_and_of_each_group_agrees_with_a_dense_recomputation(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    everywhere = torch.ones(60, dtype=torch.bool)
    assert_agrees(metrics, dense_figures(student, teacher, sequences, everywhere), "all")
    for kind, groups in groups_of(teacher, sequences).items():
        reported = reported_groups(metrics)[kind]
        assert list(reported) == [name for name, here in groups.items() if here.any()]
        for name, group in reported.items():
            here = groups[name]
            assert group.positions == int(here.sum()) == sum(each.positions for each in group.calibration.bins)
            assert_agrees(group, dense_figures(student, teacher, sequences, here), (kind, name))


@pytest.mark.parametrize("changes", [{"draws": 6}, {"draws": 0}, {"draws": 1, "min_k": 0, "max_k": 2}])
def test_certain_bounds_of_all_positions_and_of_each_group_hold_the_truth(changes, student, teacher, sequences):
    chosen = selection(**({"top_p": 0.7, "min_k": 1, "max_k": 8} | changes))
    metrics = measured(student, dense(teacher, sequences), sequences, chosen)
    groups = {"all": {"all": torch.ones(60, dtype=torch.bool)}, **groups_of(teacher, sequences)}
    reported = {"all": {"all": metrics}, **reported_groups(metrics)}
    seen = 0
    for kind, found in reported.items():
        for name, group in found.items():
            if kind == "by_entropy":  # the stored entropy decides, which is rounded
                continue
            truth = dense_figures(student, teacher, sequences, groups[kind][name])
            for figure in ("kl", "reverse_kl", "jsd", "total_variation", "acceptance", "tokens_per_step"):
                value = getattr(group, figure)
                if value is not None:
                    assert value.low <= truth[figure], (kind, name, figure)
                    assert value.high is None or truth[figure] <= value.high, (kind, name, figure)
                    seen += 1
            low, high = group.calibration.ece_to_teacher_bounds
            assert low <= truth["ece_to_teacher"] <= high, (kind, name)
    assert seen > 40


def test_a_group_of_few_documents_has_no_error(student, teacher, sequences):
    """The books are one document, though the positions of all documents are worth many."""
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    assert metrics.kl.interval is not None
    assert reported_groups(metrics)["by_column"]["books"].kl.interval is None


def test_positions_that_the_head_does_not_reach_are_left_out_of_the_agreement_of_the_top(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection(top_p=0.6, min_k=1, max_k=8, draws=8))
    assert 0 < metrics.top_positions < metrics.positions
    t, s = dense(teacher, sequences), dense(student, sequences)
    top = [logprobs.topk(5, 1).indices for logprobs in (t, s)]
    truth = float((top[0][:, :, None] == top[1][:, None]).sum((1, 2)).double().mean() / 5)
    assert metrics.top_agreement.low <= truth <= metrics.top_agreement.high < 1


def test_a_student_whose_predictions_are_not_numbers_is_named(teacher, sequences):
    broken = model(3)
    broken.lm_head.weight.data[0, 0] = torch.nan
    broken.config.name_or_path = "runs/broken"
    with pytest.raises(StudentError, match=r"not numbers(.|\n)*runs/broken(.|\n)*what to do"):
        measured(broken, dense(teacher, sequences), sequences, selection())


def test_bins_of_entropy_hold_every_position_once(student, teacher, sequences):
    metrics = measured(student, dense(teacher, sequences), sequences, selection())
    bins = metrics.by_entropy
    assert sum(entry.positions for entry in bins) == metrics.positions
    weighted = sum(entry.kl.mean * entry.positions for entry in bins) / metrics.positions
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
