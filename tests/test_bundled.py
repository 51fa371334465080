"""The bundled models: by name, with all their files, and small."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_cot import SwiresGenerator
from llava_cot.bundled import BUNDLED, model_path
from llava_cot.data import shapes
from llava_cot.prompt import build_inputs
from llava_cot.stages import STAGES

FILES = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "training.json"}


@pytest.mark.parametrize("name", BUNDLED)
def test_a_name_is_a_folder_with_a_small_model(name):
    folder = model_path(name)
    assert {path.name for path in folder.iterdir()} >= FILES
    assert (folder / "model.safetensors").stat().st_size < 8e6
    assert AutoModelForImageTextToText.from_pretrained(folder).num_parameters() < 2e6


def test_another_name_is_left_alone():
    assert model_path("org/model") == "org/model"


def test_the_second_one_answers_in_stages_as_transformers_does():
    generator, sample = SwiresGenerator.from_pretrained("tiny-qwen"), shapes.sample(804_000)
    answer = generator.answer(sample.image, sample.question, "greedy", max_new_tokens=192)
    assert [*answer.stages] == [str(stage) for stage in STAGES] and answer.conclusion
    inputs = build_inputs(generator.processor, sample.image, sample.question, "one")
    with torch.no_grad():
        expected = generator.model.generate(**inputs, max_new_tokens=192, do_sample=False)
    length = inputs["input_ids"].shape[1]
    text = generator.processor.tokenizer.decode(expected[0, length:], skip_special_tokens=True)
    assert answer.text == text
