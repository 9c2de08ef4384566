"""With a real teacher and vocabulary: every figure agrees with a dense recomputation, within what it promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.metrics import CONFIDENCE_BINS, DRAFT
from softlabel.pipeline.evaluation.positions import TOP
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from tests.conftest import topics

pytestmark = pytest.mark.long

DOCUMENTS = 10
SUMS = 1e-9
"""What float64 may differ by if the same numbers are summed in another order."""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of real texts; one of several bytes a character."""
    texts = [text[:320] for text in topics().values() if len(text) > 320][: DOCUMENTS - 1]
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    lines = [*texts, "Ein größeres Übel – «naïve» Ελληνικά 日本語 " * 4]
    path.write_text("\n".join(json.dumps({"id": str(i), "text": text}) for i, text in enumerate(lines)))
    return path


@pytest.fixture(scope="module")
def student(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with some noise in its weights."""
    folder = tmp_path_factory.mktemp("student") / "noisy"
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def logprobs(folder: Path, rows: list[dict]) -> list[torch.Tensor]:
    """(positions, V) float64 log-probabilities at the captured tokens of each row, one row at a time."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor(row["token_ids"])[None]).logits[0].double().log_softmax(1)
            found.append(logits[:-1][torch.tensor(row["loss_mask"][1:])])
    return found


def dense(
    teacher: list[torch.Tensor], student: list[torch.Tensor], rows: list[dict], tokenizer, first: int, last: int
) -> dict[str, float]:
    """Each figure as its definition says, from whole distributions at the places first to last of each sequence."""
    here = [slice(first - 1, min(last, len(part))) for part in teacher]
    accepted = [torch.minimum(p.exp(), q.exp()).sum(1) for p, q in zip(teacher, student, strict=True)]
    steps = [
        1 + part[i : i + DRAFT].cumprod(0).sum()
        for part, places in zip(accepted, here, strict=True)
        for i in range(places.start, min(places.stop, len(part) - DRAFT + 1))
    ]
    following = [token for row, places in zip(rows, here, strict=True) for token in row["token_ids"][1:][places]]
    teacher, student, accepted = (
        [part[places] for part, places in zip(parts, here, strict=True)] for parts in (teacher, student, accepted)
    )
    t, s = torch.cat(teacher), torch.cat(student)
    ids = torch.tensor(following)
    m = torch.logaddexp(t, s) - np.log(2)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(1).mean()

    confidence, guess = s.exp().max(1)
    bins = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
    top = [p.topk(TOP, 1).indices for p in (t, s)]
    tokens = tokenizer.convert_ids_to_tokens(following)
    text = sum(len(token) for token in tokens if token not in tokenizer.all_special_tokens)  # a sign stands for a byte
    nats = -s.gather(1, ids[:, None]).mean()

    def ece(targets):
        gaps = confidence - targets
        return sum(gaps[bins == b].sum().abs() for b in range(CONFIDENCE_BINS)) / len(ids)

    return {
        name: float(value)
        for name, value in {
            "cross_entropy": nats,
            "perplexity": nats.exp(),
            "bits_per_byte": nats * len(ids) / np.log(2) / text,
            "kl": kl(t, s),
            "reverse_kl": kl(s, t),
            "jsd": (kl(t, m) + kl(s, m)) / 2,
            "total_variation": 1 - torch.cat(accepted).mean(),
            "acceptance": torch.cat(accepted).mean(),
            "tokens_per_step": torch.stack(steps).mean() if steps else torch.nan,
            "agreement": (t.argmax(1) == s.argmax(1)).double().mean(),
            "top_agreement": (top[0][:, :, None] == top[1][:, None]).sum((1, 2)).double().mean() / TOP,
            "ece": ece((guess == ids).double()),
            "ece_to_teacher": ece(t.exp().gather(1, guess[:, None])[:, 0]),
            "teacher_cross_entropy": -t.gather(1, ids[:, None]).mean(),
            "teacher_entropy": -(t.exp() * t).sum(1).mean(),
        }.items()
    }


@pytest.mark.parametrize("selection", [{}, {"top_k": 16}], ids=["default", "top-16"])
def test_every_figure_agrees_with_a_dense_recomputation(selection, smollm2, student, documents, tmp_path):
    teacher = {"model": str(smollm2), "dtype": "float32"}
    settings = {"documents": str(documents), "table": str(tmp_path / "table"), "selection": selection}
    capture(CaptureConfig(**settings, teacher=teacher, shards={"eval_fraction": 0.999}))
    table = Table.open(str(tmp_path / "table"))
    rows = [row for shard in table.shards("eval") for row in read(table, shard).to_pylist()]
    config = EvaluateConfig(table=table.location, students=(str(student),), report=str(tmp_path / "r"), device="cpu")
    content = json.loads(Path(evaluate(config).json).read_text())
    found = content["students"][0]["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    models = (logprobs(smollm2, rows), logprobs(student, rows))
    assert all(all(row["loss_mask"][1:]) for row in rows)
    truth = dense(*models, rows, tokenizer, 1, 10**6)
    assert_agrees(found, content["teacher"]["metrics"], truth, estimates=True)
    groups = zip(found["by_position"], content["teacher"]["metrics"]["by_position"], strict=True)
    for group, teachers in groups:
        first, last = int(group["low"]), int(group["high"]) - 1
        assert_agrees(group, teachers, dense(*models, rows, tokenizer, first, last), estimates=first >= 16)
    if not selection:
        assert found["kl_kind"] == "unbiased"
        assert found["jsd"]["sampling_error"] < 0.05 * truth["jsd"]
        assert found["tokens_per_step"]["mean"] == pytest.approx(truth["tokens_per_step"], rel=0.02)
        assert found["calibration"]["ece_to_teacher"]["mean"] == pytest.approx(truth["ece_to_teacher"], abs=0.01)


def assert_agrees(found: dict, teacher: dict, truth: dict[str, float], estimates: bool) -> None:
    """Whether the figures over some positions are the true ones, as far as they promise to be.

    An estimate's standard error is itself estimated, and so unreliable for few positions.
    """
    for name in ("cross_entropy", "perplexity", "bits_per_byte", "agreement"):
        assert found[name]["mean"] == pytest.approx(truth[name], rel=2e-3), name
    assert found["calibration"]["ece"]["mean"] == pytest.approx(truth["ece"], abs=1e-3)
    for name in ("cross_entropy", "entropy"):
        assert teacher[name]["mean"] == pytest.approx(truth[f"teacher_{name}"], rel=2e-3)
    for name in ("kl", "reverse_kl", "jsd", "total_variation", "acceptance", "tokens_per_step", "top_agreement"):
        value = found[name]
        if value is None:  # no four positions follow each other
            continue
        assert value["low"] <= truth[name] + SUMS, name
        assert value["high"] is None or truth[name] <= value["high"] + SUMS, name
        if estimates and value["sampling_error"] is not None:
            assert value["mean"] == pytest.approx(truth[name], abs=4 * value["sampling_error"] + 2e-3), name
