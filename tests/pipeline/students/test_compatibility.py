"""The same checks of a student run against a teacher, before the capture, and against a table."""

import json
import shutil
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, JambaConfig, LlamaConfig

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.distillation import distill_in_stages
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.training.train import train
from softlabel.storage.codec import decode
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.reader import read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.views.row_groups import flat
from tests.conftest import ROOT
from tests.pipeline.building import built
from tests.pipeline.classifiers import save_classifier
from tests.pipeline.students.test_build import SIZES
from tests.pipeline.trainings import settings

ONE_STEP = {"max_steps": 1, "num_train_epochs": 1}

BAD = [
    ({"layers": (0, 2)}, UsageError, "distinct layers between 0 and 1"),
    ({"depth": 3}, UsageError, "exceeds the teacher's number of layers"),
    ({"layers": (0,), "intermediate_size": 129}, UsageError, "at most 128"),
    ({"layers": (0,), "labels": ("law",)}, UsageError, "teacher is a language model"),
    ({"model": "nowhere/at-all"}, StudentError, "can't find the model"),
    ({"model": "stranger"}, StudentError, "499 tokens"),
    ({"config": "small.json"}, StudentError, "at least 500 rows"),
    ({"config": "short.json"}, StudentError, r"at least \d+ positions"),
    ({"depth": 1, "config": "small.json"}, UsageError, "exactly one setting"),
]


def capturing(teacher, **settings):
    return CaptureConfig(documents=str(ROOT / "README.md"), table="table", teacher={"model": str(teacher)}, **settings)


def origin_of(config):
    """The origin of the table that a capture would make."""
    job = resolve(config)
    return Origin.of_capture(job.checkpoint, job.teacher, job.identity)


@pytest.fixture
def strangers(tiny_teacher, tmp_path, monkeypatch):
    """A model with one token fewer, and configurations with too few ids or too few positions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_teacher, "stranger")
    tokenizer = json.loads((tmp_path / "stranger" / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    (tmp_path / "stranger" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "small.json").write_text(LlamaConfig(vocab_size=400).to_json_string())
    (tmp_path / "short.json").write_text(GPT2Config(vocab_size=512, n_positions=20).to_json_string())


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("student", "kind", "message"), BAD, ids=[str(student) for student, *_ in BAD])
def test_an_unsuitable_student_is_refused_before_the_capture_and_before_training(
    student, kind, message, table, tiny_teacher
):
    config = StudentConfig(**student)
    with pytest.raises(kind, match=message):
        objective_of(origin_of(capturing(tiny_teacher))).require_fitting(config)
    with pytest.raises(kind, match=message):
        built(config, table)


def test_a_suitable_student_is_accepted_before_the_capture_and_before_training(table, tiny_teacher):
    for origin in (origin_of(capturing(tiny_teacher)), Origin.of(table)):
        assert objective_of(origin).require_fitting(StudentConfig(depth=2)).path == tiny_teacher
        assert origin.tokenizer().get_vocab()


def test_a_student_without_rows_for_ids_that_never_occur_is_trained_and_evaluated(tiny_teacher, tmp_path):
    """The tokenizer's last ids are often spare ones."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"id": i, "text": f"Mars has {i} moons."}) + "\n" for i in range(8)))
    capture(
        CaptureConfig(
            documents=str(documents),
            table=str(tmp_path / "table"),
            teacher={"model": str(tiny_teacher), "device": "cpu"},
            selection={"max_k": 2, "draws": 1},
            sequences={"max_tokens": 40},
            shards={"eval_fraction": 0.4},
        )
    )
    table = Table.open(str(tmp_path / "table"))
    soft = [decode(read(table, shard, SOFT_LABELS.names), table.numbering) for shard in table.shards()]
    ids = [part for labels in soft for part in (labels.head_ids, labels.tail_ids)]
    ids += [flat(read(table, shard, ["token_ids"]), "token_ids")[0] for shard in table.shards()]
    used = max(int(part.max()) for part in ids)
    assert 300 < used < table.identity.vocabulary - 1

    def config(rows):
        path = tmp_path / f"{rows}.json"
        path.write_text(LlamaConfig(**{**SIZES, "vocab_size": rows}).to_json_string())
        return settings(table, tmp_path / "student", student={"layers": None, "config": str(path)}, optimizer=ONE_STEP)

    with pytest.raises(StudentError, match=f"{used} rows, and the token id {used} occurs"):
        train(config(used))
    report = train(config(used + 1))
    score = evaluate(EvaluateConfig(table=table.location, students=(report.output,), report=str(tmp_path / "report")))
    assert 0 < score.students[0].kl < 20


@pytest.mark.parametrize("config", [BloomConfig(vocab_size=512), GPT2Config(vocab_size=512, n_positions=40)])
def test_unlimited_positions_or_enough_for_the_longest_sequence_are_accepted(config, table, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json_string())
    origin = replace(Origin.of(table), max_tokens=1000)  # longer ones could have been captured
    objective_of(origin).require_fitting(StudentConfig(config=str(tmp_path / "config.json")))


def test_classifiers_accept_known_labels_and_refuse_adapters(tiny_teacher, tmp_path):
    origin = origin_of(capturing(save_classifier(tmp_path / "teacher", tiny_teacher)))
    objective_of(origin).require_fitting(StudentConfig(depth=1, labels=("all=types,names", "statements")))
    with pytest.raises(UsageError, match="did you mean 'names'"):
        objective_of(origin).require_fitting(StudentConfig(depth=1, labels=("name", "types")))
    with pytest.raises(UsageError, match="adapters are only for language models"):
        objective_of(origin).require_loss(TrainConfig(table="t", output="o", student={"depth": 1, "lora_r": 4}))


def test_a_temperature_that_the_capture_would_not_store_is_refused(tiny_teacher):
    config = TrainConfig(table="t", output="o", student={"depth": 1}, loss={"temperature": 2.0})
    objective_of(origin_of(capturing(tiny_teacher, selection={"temperatures": (1.0, 2.0)}))).require_loss(config)
    with pytest.raises(UsageError, match=r"the table does not store temperature 2"):
        objective_of(origin_of(capturing(tiny_teacher))).require_loss(config)


@pytest.mark.parametrize("student", [{"layers": (0, 2)}, {"depth": 1, "intermediate_size": 8}], ids=str)
def test_a_teacher_that_can_not_be_pruned_so_is_refused_before_the_capture(student, tiny_teacher, tmp_path):
    """Its layers are of several kinds, and transformers decides by their place of which."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    (teacher / "generation_config.json").unlink()
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    sizes |= {"vocab_size": 512, "max_position_embeddings": 2048}
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2}
    config = JambaConfig(**sizes, **mamba, attn_layer_period=2, attn_layer_offset=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    with pytest.raises(StudentError, match=r"do not make a model of its architecture|can't be made narrower"):
        distill_in_stages(
            DistillConfig(
                documents=str(ROOT / "README.md"),
                table=str(tmp_path / "table"),
                teacher={"model": str(teacher)},
                student=student,
                output=str(tmp_path / "run"),
            ),
            capture=pytest.fail,
            train=pytest.fail,
            evaluate=pytest.fail,
        )
