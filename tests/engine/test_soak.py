"""After hundreds of answers nothing of them is left, and the soak notices where something is."""

import gc
import sys
from collections import Counter
from pathlib import Path

import pytest

from llava_cot import EngineConfig, SwiresGenerator
from llava_cot.core import Continuation
from llava_cot.engine.branch import Branch
from llava_cot.engine.history import History
from llava_cot.engine.session import Job, Session, Slot
from llava_cot.search.run import SearchRun
from llava_cot.search.search import Search
from llava_cot.search.tree import Node

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import soak

KINDS = (Branch, Continuation, History, Job, Node, Search, SearchRun, Session, Slot)


@pytest.fixture
def generator(tiny):
    config = EngineConfig(page_size=4, num_pages=soak.NUM_PAGES)
    return SwiresGenerator(tiny.model, tiny.processor, calibrations=[*tiny.calibrations.values()], engine=config)


def alive() -> Counter:
    """How many objects of each kind there are."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in KINDS)


def test_nothing_is_left_of_hundreds_of_answers(generator):
    before, again = alive(), 0
    for first in range(0, 200, soak.GROUP):
        sessions, count = soak.answer_group(generator, first)
        again += count
        assert not any(soak.held(generator, sessions).values())
        assert alive() == before
    assert again > 3  # some ran out of pages


def test_what_is_held_is_noticed(generator):
    sample = soak.shapes.sample(800_000)
    run = generator.submit(sample.image, sample.question, generator.plan(soak.SEARCHES[0]))
    generator.engine.step()
    before = soak.held(generator, [soak.weakref.ref(run.session)])
    assert all(before.values()), before
    assert alive()["Session"] >= 1
    run.cancel()
    assert not any(soak.held(generator, []).values())


@pytest.mark.parametrize("step, is_flat", [(0, True), (1, False)])
def test_memory_that_grows_fails(monkeypatch, tmp_path, step, is_flat):
    sizes = iter(range(100, 200, step) if step else [100] * 8)
    monkeypatch.setattr(soak, "memory_bytes", lambda field: next(sizes) * 2**20)
    monkeypatch.setattr(soak, "answer_group", lambda generator, first: ([], 0))
    arguments = ["soak.py", "--answers", "400", "--every", "50", "--json", str(tmp_path / "soak.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    if is_flat:
        soak.main()
    else:
        with pytest.raises(SystemExit, match=r"resident memory may grow by 2%, and grew by \d\.\d\d%"):
            soak.main()
    assert len((tmp_path / "soak.json").read_text().split("computed_again")) == 9
