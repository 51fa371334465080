"""Plans: ``search=`` may be a name, a configuration object or a policy function, and becomes a plan here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from llava_cot.core import Feature, Program, check_features
from llava_cot.scoring import resolve_scorer
from llava_cot.scoring.scorer import name_of, needs_of
from llava_cot.search.best_of_n import BestOfNConfig, best_of_n
from llava_cot.search.greedy import GreedyConfig, greedy
from llava_cot.search.majority import MajorityConfig, majority
from llava_cot.search.sample import Limits, SampleConfig, Scored, Staged, sample
from llava_cot.search.search import Search
from llava_cot.search.sentence_beam import SentenceBeamConfig, sentence_beam
from llava_cot.search.stage_beam import StageBeamConfig, stage_beam
from llava_cot.search.swires import SwiresConfig, swires
from llava_cot.search.token_beam import TokenBeamConfig, token_beam
from llava_cot.search.tree import Node
from llava_cot.stages import Grammar

Policy = Callable[[Search], Program[Node | list[Node]]]
SearchLike = str | Limits | Policy

# name -> (its configuration, the policy); a policy takes the search and its configuration
POLICIES: dict[str, tuple[type[Limits], Callable[..., Program[Node | list[Node]]]]] = {
    "greedy": (GreedyConfig, greedy),
    "sample": (SampleConfig, sample),
    "best_of_n": (BestOfNConfig, best_of_n),
    "majority": (MajorityConfig, majority),
    "sentence_beam": (SentenceBeamConfig, sentence_beam),
    "stage_beam": (StageBeamConfig, stage_beam),
    "token_beam": (TokenBeamConfig, token_beam),
    "swires": (SwiresConfig, swires),
}


# Settings with a name: the three sources' algorithms
PRESETS: dict[str, Callable[..., SwiresConfig]] = {
    "swires:published": SwiresConfig.published,
    "swires:released": SwiresConfig.released,
    "swires:prose": SwiresConfig.prose,
}


@dataclass(frozen=True)
class Plan:
    """A resolved ``search=``: its name, its settings, and the policy bound to them."""

    name: str
    config: Limits  # a policy function has no settings but the limits
    policy: Policy
    needs: frozenset[Feature] = frozenset()

    @property
    def scorer(self) -> str | None:
        """The name of the scorer, or None without one. Calibrations are looked up by it."""
        return name_of(self.config.scorer) if isinstance(self.config, Scored) else None

    def check_features(self, grammar: Grammar, offered: frozenset[Feature]) -> None:
        """Check that a back end can run this search, with its scorer, for ``grammar``.

        Raises:
            ValueError: it can't. The message names what is missing.
        """
        scorer = needs_of(resolve_scorer(self.config.scorer)) if isinstance(self.config, Scored) else frozenset()
        check_features(f"scorer={self.scorer!r}", scorer, offered)
        check_features(f"search={self.name!r}", self.needs, offered)
        turns = {Feature.EXTEND} if grammar.turns else ()
        check_features(f"a grammar with turns of the user, {list(grammar.turns)},", turns, offered)

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values. A scorer may hold a model, so its name stands for it."""
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(self.config).items()}
        plain.pop("grammar", None)  # the trace stores it
        plain["budget"] = self.config.budget and self.config.budget.limits()
        return {key: self.scorer if key == "scorer" else value for key, value in plain.items()}


def make_plan(search: SearchLike, settings: Mapping[str, Any], grammar: Grammar) -> Plan:
    """Resolve ``search`` for a model that writes ``grammar``. ``settings`` are fields of the search's configuration.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    known = settings_of(search)
    if _is_function(search):
        for key in settings:
            if key not in known:
                raise ValueError(f"a policy function must bring its own settings, got {key!r}")
        return Plan(name_of(search), Limits(**settings), search, frozenset(getattr(search, "needs", ())))
    name = _name_of_policy(search)
    config_type, policy = POLICIES[name]
    for key in settings:
        if key not in known:
            raise ValueError(f"{key} is not supported by search={name!r}; its settings are {known}")
    config = search if isinstance(search, Limits) else _default(search, config_type, grammar)
    config = replace(config, **settings)
    if isinstance(config, Staged) and config.grammar.to_dict() != grammar.to_dict():
        raise ValueError(f"grammar must be the generator's, {grammar}, got {config.grammar}")
    if grammar.turns and not config.draws:
        raise ValueError(f"search={name!r} can't ask the user's turns of the grammar, {list(grammar.turns)}")
    return Plan(name, config, lambda search: policy(search, config), config.needs)


def settings_of(search: SearchLike) -> list[str]:
    """Return the names of the settings of a search.

    Raises:
        ValueError: there is no such search.
    """
    config_type = Limits if _is_function(search) else POLICIES[_name_of_policy(search)][0]
    return [field.name for field in fields(config_type)]


def _is_function(search: SearchLike) -> TypeGuard[Policy]:
    return callable(search) and not isinstance(search, type)


def _name_of_policy(search: Any) -> str:
    by_config = {config_type: name for name, (config_type, _) in POLICIES.items()}
    name = search.partition(":")[0] if isinstance(search, str) and search in PRESETS else search
    name = name if isinstance(name, str) else by_config.get(type(search))
    if name not in POLICIES:
        known = [*sorted(POLICIES), *PRESETS]
        raise ValueError(f"search must be one of {known}, a config or a policy function, got {search!r}")
    return name


def _default(search: Any, config_type: type[Limits], grammar: Grammar) -> Limits:
    if search in PRESETS:
        return PRESETS[search](grammar)
    return config_type(grammar=grammar) if issubclass(config_type, Staged) else config_type()
