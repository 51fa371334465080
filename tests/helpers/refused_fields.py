"""A value of each field of a ``GenerationConfig`` that no search follows, at which the field would do something."""

REFUSED_VALUES = {
    "guidance_scale": 2.0,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "forced_eos_token_id": 3,
    "top_h": 0.5,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "penalty_alpha": 0.5,
    "watermarking_config": {"greenlist_ratio": 0.3},
    "stop_strings": ["4"],
    "max_time": 1.0,
    "token_healing": True,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": [],
    "force_words_ids": [[3]],
    "dola_layers": "high",
    "is_assistant": True,
    "assistant_ensemble_weight": 0.5,
}
