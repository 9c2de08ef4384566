"""The report: one self-contained page with the content of its JSON, in which names are escaped."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate
from softlabel.pipeline.evaluation.cost import Cost, Lengths, Rate, Speed
from softlabel.pipeline.evaluation.figures import Bin, Bounded, Calibration, Comparison, Group, Metrics, TeacherMetrics
from softlabel.pipeline.evaluation.partings import Likely, Place
from softlabel.pipeline.evaluation.report.content import Report, StudentSummary, TeacherSummary, column_costs, to_json
from softlabel.pipeline.evaluation.report.folder import prepare, write
from softlabel.pipeline.evaluation.report.page import to_html
from softlabel.pipeline.evaluation.report.scores import use_of
from softlabel.pipeline.evaluation.standings import Gap, Use, standings_of
from softlabel.pipeline.evaluation.tasks import TaskComparison, TaskScore
from softlabel.storage.errors import UsageError

HOSTILE = '<script>alert("$x_1$ & more")</script>'


def mean(value, error=0.02):
    return Estimate(value, error, (value - 2 * error, value + 2 * error))


def bounded(value, error=0.02, high=None):
    return Bounded(value, error, (value - 2 * error, value + 2 * error), 0.9 * value, high, 0.001)


def cost(tokens):
    speed = Speed(
        prefill=Rate(1234.5, 1200.0, 1300.0),
        decode=Rate(tokens, 0.9 * tokens, 1.1 * tokens),
        documents=None,
        memory=312_000_000,
        device=HOSTILE,
        dtype="bfloat16",
        lengths=Lengths(batch_size=1, prompt_tokens=256, new_tokens=32),
        runs=3,
    )
    return Cost(active_parameters=53_104_000, bytes=107_000_000, speed=speed)


def figures(kl, positions=100):
    bins = tuple(
        Bin(low / 10, low / 10 + 0.1, 50, low / 10 + 0.05, low / 11, low / 12, (0.0, 0.1)) for low in range(10)
    )
    return {
        "positions": positions,
        "cross_entropy": mean(2.5 + kl),
        "perplexity": mean(12.18 + kl, 0.3),
        "bits_per_byte": mean(0.9),
        "kl": bounded(kl, 0.021, 3 * kl),
        "reverse_kl": bounded(2 * kl),
        "jsd": bounded(0.2),
        "total_variation": bounded(0.4),
        "acceptance": bounded(0.6),
        "tokens_per_step": bounded(2.3),
        "agreement": mean(0.5432, 0.004),
        "top_agreement": bounded(0.7),
        "top_positions": 1234,
        "confidence": mean(0.4),
        "correct": mean(0.3),
        "calibration": Calibration(mean(0.03), mean(0.02), bins),
    }


def group(name, low, kl, positions=100):
    return Group(name=name, low=low, high=None if low is None else low + 0.5, **figures(kl, positions))


def student(name, kl, **changes):
    metrics = Metrics(
        **figures(kl, 3456),
        sequences=12,
        documents=9,
        kl_kind="unbiased",
        by_entropy=tuple(group(str(low), low / 2, kl * (1 + low), 100 + low) for low in range(5)),
        by_position=tuple(group(str(2**place), float(2**place), kl) for place in range(4)),
        by_column={"source": (group("books", None, kl), group(HOSTILE, None, 2 * kl))},
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
            "history": tuple(history),
            "trained_on": "out/table@3",
            "config": {"loss": {"divergence": "forward_kl"}},
            "circumstances": {"torch": "2.13.0"},
            "cost": cost(20 * kl),
            "tasks": (
                TaskScore(HOSTILE, "acc", 0.625, 0.011, 1200, 0, True),
                TaskScore("t", HOSTILE, 31.4, None, 9, None, False),
            ),
            **changes,
        }
    )


def report(*students, left_out=0, left_out_documents=0, error=0.02, gap=None):
    teacher = TeacherMetrics(
        cross_entropy=mean(2.61),
        perplexity=mean(13.6),
        bits_per_byte=mean(0.8),
        entropy=mean(2.58),
        calibration=students[0].metrics.calibration,
        by_entropy=(),
        by_position=(),
        by_column={},
    )
    comparisons = [
        Comparison(a.name, b.name, *(difference(a, b, error) for _ in range(3)))
        for place, a in enumerate(students)
        for b in students[place + 1 :]
    ]
    closed = [None if gap is None else mean(0.5) for _ in students]
    return Report(
        table="out/table",
        version=3,
        created="2026-01-01T00:00:00+00:00",
        sequences=12,
        positions=3456,
        documents=9,
        left_out=left_out,
        left_out_documents=left_out_documents,
        teacher=TeacherSummary("teach", 134_515_008, teacher),
        students=students,
        comparisons=tuple(comparisons),
        gap=gap,
        places=tuple(
            Place("doc", f"{HOSTILE} some text", token, (Likely(token, 0.7), Likely(" other\n", 0.2)), likely)
            for token, likely in ((" next", ((Likely(HOSTILE, 0.6),),) * len(students)),)
        ),
        standings=standings_of(
            [s.name for s in students],
            [s.metrics.kl for s in students],
            comparisons,
            closed,
            [s.use for s in students],
        ),
        task_comparisons=tuple(
            TaskComparison(pair.student, pair.other, HOSTILE, "acc", pair.kl) for pair in comparisons
        ),
        columns=column_costs({"head_ids": 20_000, "entropies": 1_500, "key": 16}, positions=1000),
        identity={"teacher": {"dtype": "bfloat16"}, "vocabulary": 49152},
        circumstances={"torch": "2.13.0", "lm-eval": "0.4"},
        config={
            "students": ["out/student", "out/control"],
            "cost": {"runs": 3, "batch_size": 4},
            "tasks": {"include": ["my tasks"], "names": [], "limit": 9, "trust_code": True},
        },
    )


def difference(a, b, error):
    distance = a.metrics.kl.mean - b.metrics.kl.mean
    interval = None if error is None else (distance - 2 * error, distance + 2 * error)
    return Difference(distance, error, interval)


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
    assert len(header) == len(teacher) == 7
    assert teacher[1].split()[0] == f"{content['teacher']['metrics']['perplexity']['mean']:.2f}"

    def shown(value, digits, scale=1):
        half = (value["interval"][1] - value["interval"][0]) / 2
        return f"{value['mean'] * scale:.{digits}f} ±{half * scale:.{digits}f}"

    for row, entry in zip(rows, content["students"], strict=True):
        metrics = entry["metrics"]
        assert row[0].startswith(entry["name"])
        assert row[1] == shown(metrics["perplexity"], 2)
        assert row[2] == shown(metrics["bits_per_byte"], 3)
        assert row[3] == shown(metrics["kl"], 3)
        assert row[4] == shown(metrics["agreement"], 1, 100)
        assert row[5] == shown(metrics["acceptance"], 1, 100)
        assert row[6] == f"{entry['parameters'] / 1e6:.1f}M"
    for number, row in enumerate(page.tables["measurements"][1:4]):
        name = ("kl", "reverse_kl", "jsd")[number]
        for cell, entry in zip(row[1:], content["students"], strict=True):
            value = entry["metrics"][name]
            high = "∞" if value["high"] is None else f"{value['high']:.3f}"
            assert cell == f"{shown(value, 3)} {value['low']:.3f} to {high}"
    assert page.tables["differences"][1][1] == f"{shown(content['comparisons'][0]['kl'], 3)} real"
    for row, column in zip(page.tables["columns"], content["columns"], strict=True):
        assert row[:2] == [column["name"], f"{column['bytes_per_position']:.2f}"]
    assert f"{sum(column['bytes_per_position'] for column in content['columns']):.2f} bytes in all" in page.text


def test_names_are_escaped():
    page = Page(to_html(report(student(HOSTILE, 1.5, warnings=(HOSTILE,)), student("control", 2.0))))
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert page.tables["scores"][2][0].startswith(HOSTILE)
    assert page.text.count(HOSTILE) >= 6
    assert "␣other↵" in page.text


def test_the_charts_show_each_student_in_a_different_color():
    made = report(student("student", 1.5), student("control", 2.0))
    svgs = to_html(made).split("<svg")[1:]
    assert len(svgs) == 8  # size, speed, entropy, calibration, by source, by position, and two curves
    for svg in svgs:
        drawing = svg.split("</svg>")[0]
        assert "var(--series-0)" in drawing
        assert "var(--series-1)" in drawing
        assert ">student<" in drawing or "books" in drawing
        assert ">control<" in drawing or "books" in drawing
        assert "#0000" not in drawing


def test_the_page_ends_with_the_commands_that_make_it_again():
    made = report(student("student", 1.5, command="softlabel train out/table@3 out/student --stream.seed 4"))
    config = {"students": ["out/student", "a $b"], "control": "c", "by": ["source"], "report": "r", "batch_tokens": 9}
    text = Page(to_html(replace(made, config=made.config | config))).text
    assert (
        "softlabel train out/table@3 out/student --stream.seed 4\n"
        "softlabel evaluate out/table@3 out/student 'a $b' --control c --by source --report r --batch-tokens 9" in text
    )


def verdict_of(made):
    return " ".join(Page(to_html(made)).text.split())


def test_the_closest_student_is_named_first():
    text = verdict_of(report(student("control", 2.0), student("student", 1.5)))
    assert (
        "student is the closest to the teacher: 1.500 nats of KL per position, 25% below control (2.000). "
        "The difference is real: 0.500 ± 0.040 nats over the same 9 documents." in text
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            0.1,
            "It can't be told which is closer to the teacher, student (1.950 nats of KL per position) or control "
            "(2.000): they differ by 0.050 ± 0.200 nats over the same 9 documents, maybe by chance.",
        ),
        (
            None,
            "There are too few documents to tell which is closer to the teacher: student (1.950 nats of KL per "
            "position) or control (2.000).",
        ),
    ],
)
def test_no_student_is_called_closest_without_a_real_difference(error, expected):
    text = verdict_of(report(student("student", 1.95), student("control", 2.0), error=error))
    assert expected in text
    assert "closest" not in text


def test_the_teacher_itself_is_not_the_closest_student():
    teacher = student("teach", 0.001, kind="teacher")
    text = verdict_of(report(teacher, student("student", 1.5), student("control", 2.0)))
    assert "student is the closest to the teacher" in text


def test_the_teacher_itself_takes_no_place():
    kl = {"teach": 0.001, "student": 1.5, "control": 2.0}
    pairs = report(*(student(name, value) for name, value in kl.items())).comparisons
    found = standings_of(
        list(kl), [mean(value) for value in kl.values()], pairs, [None] * 3, [Use(1, None)] * 3, apart={"teach"}
    )
    assert [(each.student, each.place) for each in found] == [("student", 1), ("control", 2)]


@pytest.mark.parametrize(
    ("kl", "other", "expected"),
    [
        (0.00066, 0.245, "0.00066 nats of KL per position, more than 99% below control (0.245)"),
        (1.5, 2.3e36, "1.500 nats of KL per position, more than 99% below control (2.3e+36)"),
        (0.0, 0.2, "0.000 nats of KL per position, more than 99% below control (0.200)"),
    ],
)
def test_tiny_and_huge_distances_are_shown_with_digits_that_tell_something(kl, other, expected):
    made = report(student("student", kl, cost=None), student("control", other, cost=None))
    assert expected in verdict_of(made)
    cells = [cell for table in Page(to_html(made)).tables.values() for row in table for cell in row]
    assert max(len(cell) for cell in cells if cell[:1].isdigit()) < 60


def test_a_single_student_has_a_verdict_with_its_uncertainty():
    assert "student is 1.500 ± 0.042 nats of KL per position from teach." in verdict_of(report(student("student", 1.5)))


def test_charts_and_notes_without_data_are_left_out():
    alone = student("student", 1.5, history=())
    metrics = Metrics(**{**vars(alone.metrics), "by_column": {}, "by_position": (), "calibration": None})
    html = to_html(report(student("student", 1.5, history=(), metrics=metrics)))
    assert html.count("<svg") == 1
    assert "closest" not in html
    assert "left out" not in html


def test_left_out_sequences_and_lower_bounds_are_noted():
    bounded = student("student", 1.5)
    metrics = Metrics(**{**vars(bounded.metrics), "kl_kind": "lower bound", "agreement": None})
    made = report(student("student", 1.5, metrics=metrics), left_out=3, left_out_documents=5)
    text = " ".join(Page(to_html(made)).text.split())
    assert "3 of 20 sequences of the eval split also occur, token for token, in the train split" in text
    assert "5 of 20 sequences of the eval split are of documents that also occur in the train split" in text
    assert "lower bound" in text
    assert Page(to_html(made)).tables["scores"][2][3].startswith("≥ 1.500")
    assert Page(to_html(made)).tables["scores"][2][5].startswith("≤ 60.0")
    assert "student is at least 1.500" in text
    assert to_html(made).count("KL to the teacher, at least (nats)</text>") == 4
    assert "the teacher's most likely token is not known" in text


def test_many_students_have_distinguishable_lines():
    names = [f"a-long-name-of-a-student-{number}" for number in range(9)]
    html = to_html(report(*(student(name, 1.5 + 0.001 * i) for i, name in enumerate(names))))
    assert "9 students against teach" in html
    assert "stroke-dasharray" in html


@pytest.mark.parametrize("gap", [None, Gap("model-20", "model-23")])
def test_of_many_students_the_page_draws_the_best_and_those_it_speaks_of(gap):
    students = [
        replace(student(f"model-{number:02}", 3 - 0.1 * number), warnings=("trained elsewhere",))
        for number in range(25)
    ]
    made = report(*students, gap=gap)
    html = to_html(made)
    page, drawings = Page(html), re.findall("<svg .*?</svg>", html, re.DOTALL)
    assert len(drawings) > 5
    for drawing in drawings:  # labels that do not fit are pushed off the drawing
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawing).groups())
        places = re.findall(r'<text [^>]*x="(\S+)" y="(\S+)"', drawing)
        assert places
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)
    shown = page.tables["measurements"][0][1:]
    assert len(shown) == 8
    assert {"model-00", "model-24", *filter(None, [gap and gap.control, gap and gap.reference])} <= set(shown)
    assert page.tables["places"][0][2:] == page.tables["tasks"][0][3:] == shown
    assert len(page.tables["scores"]) == 27
    assert len(page.tables["standings"]) == 26
    assert len(page.tables["differences"]) == 8 * 7 // 2 + 1
    assert page.text.count("trained elsewhere") == 1
    assert "show 8 of the 25 models" in " ".join(page.text.split())
    assert len(json.loads(to_json(made))["comparisons"]) == 300


@pytest.mark.filterwarnings("error")
def test_names_show_what_is_invisible_or_acts_on_other_text_and_drawings_accept_any_letter():
    names = ("a\u202eb\u2066", "\x1b[31mred\x07", "zero\u200bwidth", "日本語", "🏳 שלום")
    made = report(*(student(name, 1.5 + number / 9) for number, name in enumerate(names)))
    html = to_html(made)
    assert all(each.isprintable() or each in "\n\t" for each in html)
    text = Page(html).text
    for shown in (r"a\u202eb\u2066", r"\x1b[31mred\x07", r"zero\u200bwidth", *names[3:]):
        assert text.count(shown) > 5
    assert json.loads(to_json(made))["students"][0]["name"] == names[0]


def test_groups_are_shown_by_all_main_figures():
    html = to_html(report(student("student", 1.5), student("control", 2.0)))
    for what in ("forward KL, nats", "perplexity", "top-1 agreement, %", "acceptance, %", "calibration error, %"):
        assert html.count(f'colspan="4">{what}</th>') == 3  # by entropy, by position, by source
    rows = [row for row in Page(html).tables[None] if row[0] == "books"]
    assert [row[2].split()[0] for row in rows] == ["1.500", "13.68", "54.3", "60.0", "3.0"]


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


def test_a_report_on_another_table_or_other_students_is_kept(tmp_path):
    """The same evaluation again replaces its report; another one gets a folder with a number."""
    made, folder = report(student("student", 1.5)), tmp_path / "report"
    students = [each.folder for each in made.students]
    assert prepare(folder, made.table, students) == folder
    assert prepare(folder, made.table, students) == folder  # killed before it wrote a report, and started again
    assert prepare(folder, made.table, ["other"]) == tmp_path / "report-2"
    write(to_html(made), to_json(made), folder)
    assert prepare(folder, made.table, students) == folder
    assert prepare(folder, made.table, [*students, "other"]) == tmp_path / "report-3"
    assert prepare(folder, "out/other", students) == tmp_path / "report-4"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text("{")
    assert prepare(tmp_path / "damaged", made.table, students) == tmp_path / "damaged-2"


def test_students_are_ranked_and_those_that_can_not_be_told_apart_share_a_place():
    names = {"small": 2.0, "best": 1.5, "equal": 1.51, "control": 3.0}
    made = report(*(student(name, kl) for name, kl in names.items()), gap=Gap("control", None))
    page = Page(to_html(made))
    places = [["best", "1"], ["equal", "1"], ["small", "3"], ["control", "4"]]
    assert [row[:2] for row in page.tables["standings"][1:]] == places
    assert page.tables["standings"][1][2] == "50.0 ±4.0"
    assert "The gap is between the KL of control and 0, that of the teacher." in page.text


def test_costs_and_scores_on_tasks_are_on_the_page():
    page = Page(to_html(report(student("best", 1.5), student("small", 2.0))))
    assert page.tables["cost"][1] == [
        "best", "53.1M", "53.1M", "107.0 MB", "1,234 1,200 to 1,300", "30 27 to 33", "312.0 MB", "bfloat16"
    ]  # fmt: skip
    assert page.tables["tasks"][1] == [f"{HOSTILE} acc", "1,200", "0", "0.625 (± 0.011)", "0.625 (± 0.011)"]
    assert page.tables["tasks"][2][3:] == ["31.4", "31.4"]
    assert page.tables["task-differences"][1] == ["best − small", f"{HOSTILE}, acc", "-0.500 ±0.040 real"]
    assert "Only the first 9 documents of each task." in page.text
    command = "out/control --cost.batch-size 4 --tasks.include 'my tasks' --tasks.limit 9 --tasks.trust-code"
    assert command in page.text


@pytest.mark.parametrize(
    ("best", "small", "outdone"),
    [
        ((10, (50, 40, 60)), (10, (50, 40, 60)), True),  # costs the same
        ((9, (50, 40, 60)), (10, (55, 45, 65)), True),  # smaller, and as fast within the spread of the runs
        ((11, (50, 40, 60)), (10, (50, 40, 60)), False),  # larger
        ((9, (50, 40, 60)), (10, (70, 61, 80)), False),  # slower
        ((9, None), (10, None), True),
        ((11, None), (10, None), False),
    ],
)
def test_a_student_is_outdone_by_one_that_is_closer_and_costs_no_more(best, small, outdone):
    kl = {"best": 1.5, "small": 2.0, "equal": 1.51}
    pairs = report(*(student(name, value) for name, value in kl.items())).comparisons
    uses = [Use(size, rate and Rate(*rate)) for size, rate in (best, small)]
    found = standings_of(list(kl), [mean(value) for value in kl.values()], pairs, [None] * 3, [*uses, Use(8, None)])
    assert {each.student: each.outdone_by for each in found} == {
        "best": (),
        "equal": (),  # it can't be told whether the best is closer
        "small": ("best", "equal") if outdone else ("equal",),
    }


def test_trackers_get_costs_and_scores_under_names_that_they_accept():
    found = use_of(student("best", 1.5))
    assert (found["evaluation/decode_per_second"], found["evaluation/memory"]) == (30, 312_000_000)
    assert found["evaluation/_script_alert___x_1_ _ more___/script_/acc"] == 0.625
    assert use_of(student("best", 1.5, cost=None, tasks=())) == {}
