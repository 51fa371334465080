"""What a run shows while it goes on: its earlier answers count, and its speed is that of the new ones."""

import re

from helpers.runs import result

from llava_cot.evaluate.progress import Counts, shown


def test_a_run_that_goes_on_counts_its_earlier_answers(capsys):
    before = [result(0, 1.0), result(1, 0.0), result(2, "failed")]
    with shown(before, total=5) as show:
        show(result(3, 1.0))
        show(result(4, None))
    line = capsys.readouterr().err.splitlines()[-1]  # others come now and then
    assert re.match(r"5 of 5 · 40\.0 % right \(\d+ to \d+\) · 1 unparsed · 1 failed · \d+ tokens/s · 0 min left$", line)


def test_the_speed_is_that_of_the_new_answers():
    counts = Counts.of([result(0, 1.0, tokens=900), result(1, 0.0, tokens=900)])
    counts.add(result(2, 1.0, tokens=50))
    assert counts.line(seconds=10.0).endswith(" 5 tokens/s") and counts.line(10.0).startswith("66.7 % right")
