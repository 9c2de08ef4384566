"""A folder of tasks whose files name code, in whatever way, is refused before anything of it is run."""

import pytest

from softlabel.pipeline.evaluation.task_files import require_no_code, require_tasks
from softlabel.storage.errors import UsageError

TASK = "task: t\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
METRICS = frozenset({"acc", "perplexity"})


def refused(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    require_tasks(folder)
    with pytest.raises(UsageError) as caught:
        require_no_code(folder, METRICS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("process_docs: !function utils.process\n", "process_docs: !function utils.process"),
        ("class: !function task.Task\n", "class: !function task.Task"),
        ("dataset_kwargs: {data: [1, !function a.b]}\n", "data: !function a.b"),
        ("fewshot_config: {samples: !function a.samples}\n", "samples: !function a.samples"),
        ("group: g\n---\n", "can't be read"),
        ("task_list: [{task: u, doc_to_text: !function a.b}]\n", "doc_to_text: !function a.b"),
        ("process_docs: !other [x]\n", "process_docs: !other ..."),
        ("metric_list: [{metric: ./mine}]\n", "metric: ./mine"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
        ("unsafe_code: true\n", "unsafe_code: True"),
        ("dataset_kwargs: {trust_remote_code: true}\n", "trust_remote_code"),
        ("generation_kwargs: {custom_generate: ./mine}\n", "custom_generate: ./mine"),
        ("dataset_path: pandas\n", "dataset_path: pandas"),
        ("dataset_path: sql\n", "dataset_path: sql"),
        ("process_docs: !!python/name:os.system\n", "can't be read"),
        ("x: [\n", "can't be read"),
    ],
)
def test_code_is_found_wherever_a_task_can_name_it(text, found, tmp_path):
    lines = [line for line in TASK.splitlines(keepends=True) if line.partition(":")[0] != text.partition(":")[0]]
    message = refused(tmp_path, plain_yaml=TASK, task_yaml="".join(lines) + text)
    assert found in message
    assert "task.yaml" in message


def test_code_is_found_in_files_that_a_task_includes(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "_default").write_text("include: ../_more\n")
    (tmp_path / "_more").write_text("process_docs: !function a.b\n")
    (tmp_path / "tasks").mkdir()
    assert "_more" in refused(tmp_path / "tasks", t_yaml=TASK + "include: [../elsewhere/_default]\n")


def test_a_folder_of_plain_tasks_is_accepted(tmp_path):
    (tmp_path / "deep").mkdir()
    metric = "metric_list: [{metric: acc, aggregation: mean}]\nunsafe_code: false\n"
    (tmp_path / "deep" / "t.yaml").write_text(TASK + metric + "include: t.yaml\n")
    require_tasks(tmp_path)
    require_no_code(tmp_path, METRICS)


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_tasks_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=rf"no tasks(.|\n)*{folder}"):
        require_tasks(tmp_path / folder)
