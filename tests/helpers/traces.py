"""The trace of a scripted search, as the generator makes it of a real one."""

from dataclasses import asdict

from helpers.scripted import PROMPT_LENGTH, Draft, play
from llava_cot.engine.job import Usage
from llava_cot.search import SwiresConfig
from llava_cot.search.swires import swires
from llava_cot.search.tree import TRACE_VERSION, Trace
from llava_cot.stages import STAGES

HOSTILE = "</script><script>alert(1)</script><!-- <b><img src=x onerror=alert(2)> <details> & 'a' \"b\" 👩‍🚀🎉"
LONG = "word " * 1999 + "<end>"  # 10,000 characters


def trace_of(played, name="swires", question=f"How many? {HOSTILE}") -> Trace:
    nodes = played.search.nodes[1:]
    usage = Usage(
        prompt_tokens=PROMPT_LENGTH,
        decoded_tokens=7,
        generated_tokens=sum(len(node.branch.tokens) for node in nodes),
        image_encodings=1,
        steps=5,
        seconds=nodes[-1].seconds,
    )
    return Trace(
        {
            "version": TRACE_VERSION,
            "question": question,
            "search": name,
            "config": None,
            "grammar": [[str(stage), stage.open_tag, stage.close_tag] for stage in STAGES],
            "seed": 3,
            "bos": "one",
            "calibration": None,
            "prompt_tokens": PROMPT_LENGTH,
            **played.search.to_dict(),
            "answer": played.result.id,
            "answers": [played.result.id],
            "usage": asdict(usage),
        }
    )


def two_retraces() -> Trace:
    """REASONING fails in round 1 by its second best score, CAPTION in round 2, and round 3 passes with a reasoning that
    round 1 drew."""

    def script(stage, round, parent, index):
        if stage == "REASONING":
            best = {1: 0.7, 3: 0.8}[round]
            score = best if (parent, index) == (0, 0) else -0.4
            text = f"<REASONING> round {round} {HOSTILE} {index} </REASONING>"
            return Draft(score, text=LONG if (round, parent, index) == (1, 1, 1) else text, length=3)
        if stage == "CAPTION":
            ids = f"<CAPTION> caption {index} of round {round} <b>"
            return Draft(0.0 if round == 2 else 0.9 - index / 10, text=ids, length=2)
        return Draft(1.0, text="<CONCLUSION> 4 & 5 </CONCLUSION>" if stage == "CONCLUSION" else None)

    def config(scorer):
        return SwiresConfig.published(
            scorer=scorer, cutoff=0.5, retrace={"CAPTION": "CAPTION", "REASONING": "CAPTION"}, max_rounds=4
        )

    return trace_of(play(swires, config, script))
