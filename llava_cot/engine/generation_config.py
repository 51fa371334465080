"""What becomes of each field of transformers' ``GenerationConfig``. Every field is in one of these tables."""

from functools import cache
from typing import Any

from transformers import GenerationConfig

# Every search reads these from ``model.generation_config``. With each are the values at which it does nothing.
FOLLOWED: dict[str, tuple[Any, ...]] = {
    "eos_token_id": (None,),
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "forced_bos_token_id": (None,),
}
# Settings of a search, which is told them itself, and transformers' defaults
SETTINGS: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "temperature": (None, 1.0),
    "top_k": (None, 50),
    "top_p": (None, 1.0),
    "min_p": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
}
# Arguments of ``SwiresGenerator.generate``
ARGUMENTS = frozenset({"max_length", "max_new_tokens", "pad_token_id", "return_dict_in_generate"})
# No search can follow these. With each are the values at which it does nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "forced_eos_token_id": (None,),
    "top_h": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "penalty_alpha": (None, 0),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "is_assistant": (None, False),
    "assistant_ensemble_weight": (None,),
}
# Outputs that a search does not have; it is an error to ask for them.
OUTPUTS = frozenset({"output_attentions", "output_hidden_states", "output_scores", "output_logits"})
# These say how transformers computes, or are of encoder-decoder models: they do not change what a search returns.
IRRELEVANT = frozenset(
    {
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
        *("bos_token_id", "decoder_start_token_id"),
        *("use_mtp", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    }
)
KNOWN = {*FOLLOWED, *SETTINGS, *ARGUMENTS, *REFUSED, *OUTPUTS, *IRRELEVANT}


def refuse(config: GenerationConfig, prefix: str = "") -> None:
    """Refuse what no search can follow, and what a newer transformers has added to its generation configurations.

    Raises:
        ValueError: a field has a value at which it would do something. The message names it, after ``prefix``.
    """
    for name, unset in {**REFUSED, **_unknown()}.items():
        if (value := getattr(config, name, None)) not in unset:
            raise ValueError(f"{prefix}{name} is not supported by a search, got {value!r}")


@cache
def _unknown() -> dict[str, tuple[Any, ...]]:
    """The fields of this transformers that are in none of the tables, and the values that mean nothing was asked."""
    new = {name: value for name, value in vars(GenerationConfig()).items() if name[0] != "_" and name not in KNOWN}
    defaults = GenerationConfig._get_default_generation_params()
    return {name: (None, False, value, defaults.get(name)) for name, value in new.items()}
