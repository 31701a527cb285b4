"""The report judges a run by its baselines, folds what is long, shortens names in the middle, and shows what it should."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from fieldguide.core.report_elements import (
    Bars,
    Code,
    Gallery,
    Legend,
    Lines,
    Matrix,
    Picture,
    Quote,
    Quotes,
    Table,
)
from fieldguide.report import axis, media, render, tables, training_curves, usage, verdict
from fieldguide.report.text import shorten
from fieldguide.tasks import tasks
from fieldguide.tasks.report_builder import ExampleInput
from fieldguide.tasks.spec import Metric

ACCURACY = Metric("accuracy", "max", "correct", percent=True)
ERROR = Metric("rmse", "min", "root mean squared error", label="RMSE")


def record(value, interval, *baselines, metric=ACCURACY):
    return {
        "scores": {
            "test": {metric.name: value},
            "intervals": {metric.name: interval},
            "baselines": [{"name": f"b{i}", "what": "", "scores": {metric.name: b}} for i, b in enumerate(baselines)],
        }
    }


@pytest.mark.parametrize(
    "found, metric, text, tone",
    [
        (record(0.9, (0.85, 0.95), 0.5, 0.7), ACCURACY, None, None),
        (record(0.9, (0.85, 0.95), 0.5, 0.87), ACCURACY, "not clearly above the baseline", "neutral"),
        (record(0.0, (0.0, 0.0), 0.0), ACCURACY, "no better than the baseline", "warning"),
        (record(0.9, (0.85, 0.95), 0.5, 0.92), ACCURACY, "below the baseline", "warning"),
        (record(0.9, (0.85, 0.95), 0.5, 0.97), ACCURACY, "below the baseline", "bad"),
        (record(3.0, (2.5, 3.5), 5.0, metric=ERROR), ERROR, None, None),
        (record(3.0, (2.5, 3.5), 2.7, metric=ERROR), ERROR, "below the baseline", "warning"),
        (record(3.0, (2.5, 3.5), 1.0, metric=ERROR), ERROR, "below the baseline", "bad"),
        (record(0.9, (0.85, 0.95)), ACCURACY, None, None),
    ],
)
def test_a_run_is_judged_by_its_baselines(found, metric, text, tone):
    badge = verdict.judge(found, metric)
    assert (badge and badge.text, badge and badge.tone) == (text, tone)
    sentence = verdict.summarize_result(found, metric)
    assert ("does not beat" in sentence) == (tone == "bad")
    assert ("within the interval" in sentence) == (text == "below the baseline" and tone == "warning")
    page = render.render(title="T", verdict=sentence, facts=[], sections=[], badge=badge)
    assert ('class="verdict bad"' in page) == (tone == "bad") and (text is None or f">{text}<" in page)


def test_upper_bounds_are_no_baselines():
    found = record(0.9, (0.85, 0.95), 0.5)
    found["scores"]["baselines"].append({"name": "best", "what": "", "bound": True, "scores": {"accuracy": 0.99}})
    assert verdict.judge(found, ACCURACY) is None


def test_metrics_are_named_as_the_field_writes_them():
    titles = {m.name: m.title for task in tasks().values() for m in task.metrics}
    wanted = {"map": "mAP", "miou": "mIoU", "mase": "MASE", "auc": "AUC", "rmse": "RMSE", "bleu": "BLEU", "ndcg_10": "NDCG@10"}
    assert {name: titles[name] for name in wanted} == wanted
    assert titles["balanced_accuracy"] == "balanced accuracy"
    assert (ACCURACY.heading, Metric("map", "max", "", label="mAP").heading) == ("Accuracy", "mAP")


def test_names_are_shortened_in_the_middle_and_kept_as_tooltips():
    name = "classes/animals/" + "x" * 200 + "/tabby cat"
    assert shorten(name, 30).startswith("classes/animals/x") and shorten(name, 30).endswith("/tabby cat")
    assert len(shorten(name, 30)) == 30 and shorten("short", 30) == "short"
    for element in (
        Bars("b", values={name: 1.0, "b": 2.0}),
        Matrix("m", labels=[name, "b", "c"], counts=np.eye(3)),
        Table("t", header=("a", "b"), rows=[[name, 1]]),
        Table("t", header=(name, "b"), rows=[["a", 1]]),
        Lines("l", lines={name: ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}),
    ):
        drawn = render.draw(element)
        assert f'title="{name}"' in drawn and "…" in drawn, type(element)


def png(seed, side=8):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_long_content_is_folded_but_complete():
    css = render.read_template("report.css")
    for element, switch, last in (
        (Table("t", header=("a", "b"), rows=[[f"row {i}", i] for i in range(40)]), "Show all 40 rows", "row 39"),
        (Quotes("q", quotes=[Quote(f"text {i}", "c") for i in range(20)]), "Show all 20 texts", "text 19"),
        (Gallery("g", pictures=[Picture(png(i), f"tile {i}") for i in range(30)]), "Show all 30 images", "tile 29"),
    ):
        drawn = render.draw(element)
        assert switch in drawn and last in drawn and 'type="checkbox"' in drawn
        visible = re.search(r'class="fold (fold-(\d+))"', drawn)
        assert re.search(rf"\.{visible[1]}:has\(.*nth-child\(n \+ {int(visible[2]) + 1}\)", css), (
            "a style rule hides the others"
        )
    assert "checkbox" not in render.draw(Table("t", header=("a", "b"), rows=[["a", 1]] * 12))


def test_texts_with_many_lines_are_cut_like_long_ones():
    lines = "\n".join(f"line {i}" for i in range(30))
    drawn = render.draw(Quotes("q", quotes=[Quote(lines, "c")]))
    beginning = re.search(r'class="text start"[^>]*>(.*?)</span>', drawn, re.S)[1]
    assert "line 5" in beginning and "line 6" not in beginning and "line 29" in drawn
    assert render.draw(Quotes("q", quotes=[Quote("\n\n\na\n\n\n\n \n\nb\n\n", "c")])).count("\n") == 2  # blank lines are joined


def test_this_network_is_highlighted():
    drawn = render.draw(Bars("b", values={"this model": 3, "baseline": 2}, highlight=("this model",)))
    assert re.findall(r'<li( class="pale")?>', drawn) == ["", ' class="pale"']
    assert "pale" not in render.draw(Bars("b", values={"a": 3, "b": 2}))


def test_dates_have_round_ticks():
    day = 86_400
    ticks = lambda start, days, count=5: [
        text for _, text in axis.make_date_axis(np.array([start, start + days * day], dtype=float), count).ticks
    ]
    start = int(np.datetime64("2024-04-22T05:00", "s").astype(int))
    assert ticks(start, 1) == ["06:00", "12:00", "18:00", "23 Apr"]
    assert ticks(start, 4) == ["23 Apr", "24 Apr", "25 Apr", "26 Apr"]
    assert ticks(start, 25) == ["29 Apr", "6 May", "13 May"]  # Mondays
    assert ticks(start, 130) == ["May 2024", "Jun 2024", "Jul 2024", "Aug 2024"]
    assert ticks(start, 365 * 9) == ["2026", "2028", "2030", "2032"]
    assert all(
        0 <= axis.make_date_axis(np.array([0.0, 1e9]), 5)(v) <= 1 for v, _ in axis.make_date_axis(np.array([0.0, 1e9]), 5).ticks
    )
    x = start + np.arange(50) * 3600
    drawn = render.draw(Lines("l", lines={"actual": (x, np.arange(50)), "forecast": (x, np.arange(50))}, dates=True))
    assert ">23 Apr<" in drawn and "&#34;dates&#34;:true" in drawn and str(x[1]) in drawn  # hover data are exact


def test_views_are_shown_together_and_stored_once():
    picture = Picture(png(0), "a", True, view="true", views={"predicted": png(1)})
    page = render.render(
        title="T", verdict="", facts=[], sections=[render.Section("S", "", [Gallery("g", pictures=[picture])])]
    )
    assert page.count('class="view"') == 2 and ">predicted<" in page and page.count("base64,") == 2
    again = [Gallery("g", pictures=[picture])] * 2
    assert render.render(title="T", verdict="", facts=[], sections=[render.Section("S", "", again)]).count("base64,") == 2


def test_weights_shade_words():
    text = "good <b> bad word"
    quote = Quote(text, "c", weights=[(0, 4, 0.5), (9, 12, -0.25), (13, 17, 0.001)])
    marked = media.mark_weights(quote)
    assert '<mark style="--shade:1.00">good</mark>' in marked and "<mark" not in marked.split("bad")[1]
    assert 'class="against">bad</mark>' in marked and "&lt;b&gt;" in marked
    assert re.sub(r"<[^>]*>", "", marked).replace("&lt;", "<").replace("&gt;", ">") == text


def test_code_and_legends_are_drawn():
    assert "<pre><code>a &lt; b\n  c</code></pre>" in render.draw(Code("c", "", "a < b\n  c"))
    assert "rgb(1 2 3)" in render.draw(Legend("l", colors={"sky": (1, 2, 3)}))


def test_losses_are_smoothed_without_lag_at_the_start():
    steps = np.arange(200)
    truth = 2 * np.exp(-steps / 10) + 1
    noisy = truth + np.random.default_rng(0).normal(0, 0.2, 200)
    smoothed = training_curves.smooth(noisy)
    assert np.abs(smoothed - truth)[50:].max() < 0.5 * np.abs(noisy - truth)[50:].max()
    assert np.abs(smoothed - truth)[:10].max() < 0.8
    assert np.isfinite(training_curves.smooth(np.array([1.0, np.nan, 3.0, np.inf, 2.0]))).all()
    chart = training_curves.draw_losses({"loss": (steps, noisy)}, ([0, 100], [2.0, 1.0]))
    assert list(chart.lines) == ["training, as logged", "training", "validation"] and chart.faint == ["training, as logged"]


def test_instructions_quote_what_a_shell_would_split():
    command, python = usage.build_usage("/a b/run", ExampleInput("it's one text", {"question": "what is it?"}), "/d/x.csv")
    assert command.code.splitlines()[0] == ("fieldguide predict '/a b/run' 'it'\"'\"'s one text' --set 'question=what is it?'")
    assert python.code.endswith("""print(run.predict("it's one text", question='what is it?')[0])""")
    wide = ExampleInput({f"column {i}": i / 7 for i in range(40)})
    code = usage.build_usage("run", wide, None)[1].code
    assert max(map(len, code.splitlines())) < 110 and len(code.splitlines()) < 30
    assert eval(code[code.index("{") : code.rindex("}") + 1]) == wide.source


def test_long_tables_and_captions_are_bounded():
    drawn = render.draw(Gallery("g", pictures=[Picture(png(0), "word " * 500)]))
    assert len(re.search(r'class="caption"[^>]*>([^<]*)<', drawn)[1]) <= media.MAX_CAPTION_CHARACTERS
    assert len(tables.draw_table(Table("t", header=("a", "b"), rows=[["x" * 100_000, "y" * 100_000]]))) < 10_000
