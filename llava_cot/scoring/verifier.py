"""The verifier of a policy: a reward model in the policy's folder, which may see the image better than the policy."""

from pathlib import Path

from llava_cot.scoring.reward_model import RewardModelScorer, View, verify_policy
from llava_cot.tiny import tiny_path


def load_verifier(view: View, policy: Path | None = None) -> RewardModelScorer:
    """Load the verifier in the folder ``policy``, by default that of the bundled tiny model.

    ``view`` turns the image that was asked about into the one that the verifier sees. The bundled verifier was trained
    on images without pixel noise, as ``llava_cot.data.shapes.clean_view`` makes them.

    Raises:
        ValueError: the verifier was trained for another policy.
    """
    folder = policy or tiny_path()
    verify_policy(folder / "verifier", folder)
    scorer = RewardModelScorer.from_pretrained(folder / "verifier", view=view)
    scorer.__name__ = "verifier"  # type: ignore[attr-defined]
    return scorer
