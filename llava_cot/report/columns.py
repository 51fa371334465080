"""Assign candidates to columns. A column is a step on the way to an answer, so a child is always right of its parent.

A stage that a path visits twice has two columns. Stages that are alternatives at one step share a column.
"""

from collections.abc import Collection, Mapping, Sequence

from llava_cot.trace.schema import NodeData

UNSTAGED = 1_000_000  # the step of whole answers and of parts of answers, after every stage
GREEDY = UNSTAGED + 1  # the step of answers that were finished greedily after the budget was spent


def columns(
    nodes: Mapping[int, NodeData], greedy: Collection[int], names: Sequence[str]
) -> tuple[list[str], dict[int, int]]:
    """Return the heading of each column, and the column of each node by id.

    Args:
        nodes: the nodes by id, parents before their children.
        greedy: the ids of the nodes that were finished greedily.
        names: the stages in the order of the grammar.
    """
    steps: dict[int, int] = {}
    staged = {0: 0}  # the number of stages on the path to each node
    for id, node in nodes.items():
        staged[id] = staged.get(node["parent"], 0) + (node["stage"] is not None)
        steps[id] = staged[id] if node["stage"] is not None else GREEDY if id in greedy else UNSTAGED
    stages: dict[int, set[str]] = {step: set() for step in sorted(set(steps.values()))}
    for id, node in nodes.items():
        if node["stage"] is not None:
            stages[steps[id]].add(node["stage"])
    parts = any(steps.get(nodes[id]["parent"]) == UNSTAGED for id, step in steps.items() if step == UNSTAGED)
    headings = {UNSTAGED: "PARTS OF ANSWERS" if parts else "ANSWERS", GREEDY: "FINISHED GREEDILY"}
    order = {name: place for place, name in enumerate(names)}
    is_looped = len(set().union(*stages.values())) < sum(map(len, stages.values()))
    for step, found in stages.items():
        if found:
            heading = " / ".join(sorted(found, key=lambda name: (order.get(name, len(order)), name)))
            headings[step] = f"{heading} · step {step}" if is_looped else heading
    place = {step: column for column, step in enumerate(stages)}
    return [headings[step] for step in stages], {id: place[step] for id, step in steps.items()}
