"""The report: one self-contained page with the content of its JSON, in which names are escaped."""

import json
from html.parser import HTMLParser

import pytest

from softlabel.pipeline.evaluation.metrics import EntropyBin, MeanWithError, Metrics
from softlabel.pipeline.evaluation.report import (
    Report,
    StudentSummary,
    TeacherSummary,
    column_costs,
    perplexity,
    to_html,
    to_json,
    write,
)
from softlabel.storage.errors import UsageError

HOSTILE = '<script>alert("$x_1$ & more")</script>'


def student(name, kl, **changes):
    metrics = Metrics(
        sequences=12,
        positions=3456,
        cross_entropy=MeanWithError(2.5 + kl, 0.02),
        kl=MeanWithError(kl, 0.021),
        kl_kind="unbiased",
        agreement=MeanWithError(0.5432, 0.004),
        teacher_cross_entropy=MeanWithError(2.61, 0.03),
        teacher_entropy=MeanWithError(2.58, 0.02),
        by_entropy=tuple(EntropyBin(low / 2, low / 2 + 0.5, 100 + low, kl * (1 + low)) for low in range(5)),
    )
    history = [{"step": step, "loss": 9 / step, "hard": 1.0, "soft": 1.0} for step in range(1, 60)]
    history += [{"step": step, "eval_kl": 9 / step} for step in (20, 40, 59)]
    return StudentSummary(
        **{
            "name": name,
            "folder": f"out/{name}",
            "parameters": 53_104_000,
            "objective": "forward KL",
            "metrics": metrics,
            "perplexity": perplexity(metrics.cross_entropy),
            "history": tuple(history),
            "trained_on": "out/table@3",
            "config": {"loss": {"divergence": "forward_kl"}},
            "circumstances": {"torch": "2.13.0"},
            **changes,
        }
    )


def report(*students, left_out=0):
    cross_entropy = students[0].metrics.teacher_cross_entropy
    teacher = TeacherSummary("teach", 134_515_008, cross_entropy, perplexity(cross_entropy), MeanWithError(2.58, 0.02))
    return Report(
        table="out/table",
        version=3,
        created="2026-01-01T00:00:00+00:00",
        sequences=12,
        positions=3456,
        left_out=left_out,
        teacher=teacher,
        students=students,
        columns=column_costs({"head_ids": 20_000, "entropies": 1_500, "key": 16}, positions=1000),
        identity={"teacher": {"dtype": "bfloat16"}, "vocabulary": 49152},
        circumstances={"torch": "2.13.0"},
        config={"students": ["out/student", "out/control"]},
    )


class Page(HTMLParser):
    """Elements with their attributes, and the cells of each table by its id."""

    VOID = ("meta", "link", "img", "path", "use", "br", "rect", "source", "input")

    def __init__(self, html):
        super().__init__()
        self.elements, self.tables, self.text = [], {}, ""
        self._table = self._cell = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._table[-1].append(" ".join(self._cell.split()))
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += " " + data


def test_the_page_is_self_contained():
    html = to_html(report(student("student", 1.5), student("control", 2.0)))
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "img", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name.endswith(("src", "href", "srcset", "action", "data", "poster")):
                assert value.startswith("#"), (tag, name, value)
            assert "//" not in (value or ""), (tag, name, value)
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html.replace("url(#", "")


def test_the_page_shows_the_numbers_of_the_json():
    made = report(student("student", 1.5), student("control", 2.0))
    content, page = json.loads(to_json(made)), Page(to_html(made))
    header, teacher, *rows = page.tables["scores"]
    assert len(header) == len(teacher) == 5
    assert teacher[1].split()[0] == f"{content['teacher']['perplexity']['mean']:.2f}"
    for row, entry in zip(rows, content["students"], strict=True):
        metrics = entry["metrics"]
        assert row[0].startswith(entry["name"])
        assert row[1] == f"{entry['perplexity']['mean']:.2f} ±{entry['perplexity']['error']:.2f}"
        assert row[2] == f"{metrics['kl']['mean']:.3f} ±{metrics['kl']['error']:.3f}"
        assert row[3] == f"{100 * metrics['agreement']['mean']:.1f} ±{100 * metrics['agreement']['error']:.1f}"
        assert row[4] == f"{entry['parameters'] / 1e6:.1f}M"
    for row, column in zip(page.tables["columns"], content["columns"], strict=True):
        assert row[:2] == [column["name"], f"{column['bytes_per_position']:.2f}"]
    assert f"{sum(column['bytes_per_position'] for column in content['columns']):.2f} bytes in all" in page.text


def test_names_are_escaped():
    page = Page(to_html(report(student(HOSTILE, 1.5, warnings=(HOSTILE,)), student("control", 2.0))))
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert page.tables["scores"][2][0].startswith(HOSTILE)
    assert page.text.count(HOSTILE) >= 4


def test_the_charts_show_each_student_in_a_different_color():
    made = report(student("student", 1.5), student("control", 2.0))
    svgs = to_html(made).split("<svg")[1:]
    assert len(svgs) == 3
    for svg in svgs:
        drawing = svg.split("</svg>")[0]
        assert "var(--series-0)" in drawing
        assert "var(--series-1)" in drawing
        assert ">student<" in drawing
        assert ">control<" in drawing
        assert "#0000" not in drawing


def test_the_closest_student_is_named_first():
    page = Page(to_html(report(student("student", 1.5), student("control", 2.0))))
    assert (
        "student is the closest to the teacher: 1.500 nats of KL per position, 25% below control (2.000)." in page.text
    )


def test_no_student_is_called_closest_without_a_significant_difference():
    page = Page(to_html(report(student("student", 1.95), student("control", 2.0))))
    assert (
        "There are too few sequences to tell which is closer to the teacher: student (1.950 nats of KL per position) "
        "or control (2.000)." in page.text
    )
    assert "closest" not in page.text


def test_charts_and_notes_without_data_are_left_out():
    alone = student("student", 1.5, history=())
    html = to_html(report(alone))
    assert html.count("<svg") == 1
    assert "closest" not in html
    assert "left out" not in html


def test_left_out_sequences_and_lower_bounds_are_noted():
    bounded = student("student", 1.5)
    metrics = Metrics(**{**vars(bounded.metrics), "kl_kind": "lower bound", "agreement": None})
    text = " ".join(Page(to_html(report(student("student", 1.5, metrics=metrics), left_out=3))).text.split())
    assert "3 of 15 sequences of the eval split also occur, token for token, in the train split" in text
    assert "lower bound" in text
    assert "the teacher's most likely token is not known" in text


def test_many_students_have_distinguishable_lines():
    names = [f"a-long-name-of-a-student-{number}" for number in range(9)]
    html = to_html(report(*(student(name, 1.5 + 0.001 * i) for i, name in enumerate(names))))
    assert "9 students against teach" in html
    assert "stroke-dasharray" in html


def test_page_and_json_are_written_to_a_new_folder_without_leftovers(tmp_path):
    made = report(student("student", 1.5))
    html, content = write(to_html(made), to_json(made), tmp_path / "deep" / "report")
    assert html.read_text() == to_html(made)
    assert json.loads(content.read_text())["students"][0]["metrics"]["kl"]["mean"] == 1.5
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json"]


def test_a_report_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UsageError, match="can't be written"):
        write("page", b"content", tmp_path / "report")
