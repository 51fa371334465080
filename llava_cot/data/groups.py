"""Groups for policy gradients: all candidates after one prefix, with advantages and log-probs."""

from collections.abc import Iterable, Iterator
from statistics import fmean, stdev
from typing import Any

from llava_cot.data.forms import MESSAGES
from llava_cot.data.traces import By, Item, TraceTree, chat_of, row_of


def to_groups(
    items: Iterable[Item], *, by: By = "score", scale: bool = False, missing_reward: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield all candidates after one prefix, losers included, with advantages and exact log-probs, e.g. for GRPO.

    The advantage is the reward minus the mean of the siblings. With ``scale`` it is divided by their standard deviation
    (n - 1) + 1e-4. A whole group is a sample of the policy, and a selected path is not. So a group is left out if a
    reward in it is unknown and ``missing_reward`` is None, or if a budget stopped any of it. Tokens that were drawn
    greedily after a spent budget are in no group.

    ``completion_ids[i]`` were drawn after the prompt and ``prefix_ids`` with the settings in ``sampling``. Their
    ``sampling_logprobs`` belong to the filtered distribution that they were drawn from; an importance weight needs
    them. Their ``logprobs`` belong to the model at temperature 1. Both are in nats. ``prompt_tokens`` is the length of
    the prompt. The ids of turns of the user are in ``prefix_ids``.

    Raises:
        ValueError: a trace is of a search that does not sample, or of a policy function, whose settings it lacks.
    """
    for item in items:
        tree = TraceTree(item)
        tree.check(by)
        sampling = _sampling_of(tree)
        for siblings in tree.siblings():
            drawn = [node for node in siblings if node.tokens and node.id not in tree.trace.drawn_after_budget]
            found = [tree.quality(node, by) for node in drawn]
            known = [missing_reward if reward is None else reward for reward in found]
            values = [float(reward) for reward in known if reward is not None]
            if len(drawn) < 2 or len(values) < len(drawn) or any(node.finish == "stopped" for node in drawn):
                continue
            prefix = tree.prefix(drawn[0])
            yield row_of(
                tree,
                drawn,
                prompt=MESSAGES.prompt(tree.question, chat_of(prefix, drawn[0].turn), tree.bos),
                completions=[node.text for node in drawn],
                rewards=values,
                advantages=_advantages(values, scale),
                stages=[node.stage or "" for node in drawn],
                closed=[node.closed for node in drawn],
                kept=[node.kept for node in drawn],
                parent=drawn[0].parent,
                prompt_tokens=tree.trace.data["prompt_tokens"],
                prefix_ids=[token for node in prefix for token in (*node.given, *node.tokens)] + drawn[0].given,
                completion_ids=[node.tokens for node in drawn],
                sampling_logprobs=[node.sampling_logprobs for node in drawn],
                logprobs=[node.logprobs for node in drawn],
                sampling=sampling,
            )


def _advantages(rewards: list[float], scale: bool) -> list[float]:
    mean = fmean(rewards)
    spread = stdev(rewards) + 1e-4 if scale else 1.0
    return [(reward - mean) / spread for reward in rewards]


def _sampling_of(tree: TraceTree) -> dict[str, float]:
    config, search = tree.trace.data["config"], tree.trace.data["search"]
    if any(name not in config for name in ("temperature", "top_k", "top_p", "min_p")):
        raise ValueError(f"search of trace {tree.trace_id!r} must sample by its settings, got {search!r}")
    return {
        "temperature": float(config["temperature"]),
        "top_k": config["top_k"],
        "top_p": float(config["top_p"]),
        "min_p": float(config["min_p"]),
    }
