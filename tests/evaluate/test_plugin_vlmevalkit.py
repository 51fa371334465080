"""The model class in VLMEvalKit's own inference job, and the launcher's arguments in VLMEvalKit's own parser."""

import sys
from pathlib import Path

import pytest
from helpers.vlmeval_source import bare_vlmeval, vlmeval_functions

from llava_cot.data import shapes

SEEDS = (800_003, 800_004)
SETTINGS = {"n": 2, "max_new_tokens": 160}


@pytest.fixture(scope="module")
def plugin():
    with bare_vlmeval() as models:
        from llava_cot.evaluate.plugins import vlmevalkit

        yield vlmevalkit, models


@pytest.fixture(scope="module")
def model(plugin):
    return plugin[0].LlavaCot("tiny", "best_of_n", 3, {"device": "cpu"}, **SETTINGS)


class ShapesDataset:
    """What VLMEvalKit's jobs use of a dataset."""

    dataset_name = "Shapes"
    TYPE = "VQA"
    MODALITY = "IMAGE"

    def __init__(self, folder):
        import pandas

        self.samples = [shapes.sample(seed) for seed in SEEDS]
        self.paths = [str(folder / f"{seed}.png") for seed in SEEDS]
        for sample, path in zip(self.samples, self.paths):
            sample.image.save(path)
        rows = [{"index": at, "question": sample.question} for at, sample in enumerate(self.samples)]
        self.data = pandas.DataFrame(rows)

    def __len__(self):
        return len(self.data)

    def build_prompt(self, line):
        return [
            {"type": "image", "value": self.paths[line["index"]]},
            {"type": "text", "value": line["question"]},
        ]

    def dump_image(self, line):
        return [self.paths[line["index"]]]


@pytest.mark.parametrize("split", ["", "1"])
def test_the_inference_job(model, tmp_path, monkeypatch, split):
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path, load

    monkeypatch.setenv("PRED_FORMAT", "tsv")
    if split:
        monkeypatch.setenv("SPLIT_THINK", split)
    dataset = ShapesDataset(tmp_path)
    infer_data_job(model, str(tmp_path), "llava-cot", dataset)
    table = load(get_pred_file_path(str(tmp_path), "llava-cot", "Shapes"))
    for at, sample in enumerate(dataset.samples):
        answer = model.generator.answer(sample.image, sample.question, "best_of_n", seed=3, **SETTINGS)
        row = table.iloc[at]
        assert str(row["prediction"]) == answer.conclusion != ""
        if split:
            whole = f"{row['thinking']} <CONCLUSION> {answer.conclusion} </CONCLUSION>"
            assert "".join(whole.split()) == "".join(answer.text.split())
    assert ("thinking" in table) == bool(split)


def test_thinking_is_all_before_the_conclusion(model):
    assert model.split_thinking("<SUMMARY> a </SUMMARY> <CONCLUSION> C </CONCLUSION>") == (
        "C",
        "<SUMMARY> a </SUMMARY>",
    )
    assert model.split_thinking("<SUMMARY> a </SUMMARY>") == ("", "<SUMMARY> a </SUMMARY>")
    assert model.split_thinking("<SUMMARY> a </SUMMARY> <CONCLUSION> C") == ("C", "<SUMMARY> a </SUMMARY>")
    assert model.split_thinking(" C") == ("C", "")  # a model that answers plainly
    assert model.split_thinking("") == ("", "")


@pytest.mark.parametrize("split", ["", "1"])
def test_a_text_without_stages_is_its_own_conclusion(plugin, tmp_path, monkeypatch, split):
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path, load

    monkeypatch.setenv("PRED_FORMAT", "tsv")
    if split:
        monkeypatch.setenv("SPLIT_THINK", split)
    cut = plugin[0].LlavaCot("tiny", "greedy", 0, {"device": "cpu"}, max_new_tokens=1)
    infer_data_job(cut, str(tmp_path), "llava-cot", ShapesDataset(tmp_path))
    table = load(get_pred_file_path(str(tmp_path), "llava-cot", "Shapes"))
    assert list(table["prediction"]) == ["<SUMMARY"] * len(SEEDS)  # the first of the tokens of a tag


def test_it_is_a_model_of_vlmevalkit(plugin, model):
    from vlmeval.vlm.base import BaseModel

    assert isinstance(model, BaseModel)
    assert not model.use_custom_prompt("MMStar")


OWN = "--pretrained tiny --search swires:published --seed 7 --load dtype=float32"
OWN += " --set max_new_tokens=64 --set scorer=confidence"
ALL = ["launcher", *OWN.split(), "--data", "MMStar", "--mode", "infer"]


def test_the_launcher_hands_over(plugin, monkeypatch):
    module, models = plugin
    parse_args = vlmeval_functions("run.py", "parse_args", "parse_reuse_aux_arg")[0]
    seen = []
    monkeypatch.setattr(module.runpy, "run_path", lambda path, run_name: seen.append((path, run_name, parse_args())))
    monkeypatch.setattr(sys, "argv", [*ALL])
    module.main()
    ((path, run_name, arguments),) = seen
    assert Path(path).parts[-2:] == ("vlmeval", "run.py") and run_name == "__main__"
    assert (arguments.data, arguments.mode, arguments.model) == (["MMStar"], "infer", ["llava-cot-swires-published"])
    built = models["llava-cot-swires-published"]
    assert built.args == ("tiny", "swires:published", 7, {"dtype": "float32"})
    assert built.keywords == {"max_new_tokens": 64, "scorer": "confidence"}


def test_the_launcher_in_a_checkout_whose_script_is_beside_the_package(plugin, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["vlmeval"], "__path__", [str(tmp_path / "vlmeval")])
    monkeypatch.setattr(sys, "argv", [*ALL])
    with pytest.raises(ValueError, match=r"must be installed with its run\.py, got none in or beside '.*vlmeval'"):
        plugin[0].main()
    (tmp_path / "run.py").write_text("import sys; from pathlib import Path; Path('seen').write_text(str(sys.argv[1:]))")
    monkeypatch.chdir(tmp_path)
    plugin[0].main()
    assert Path("seen").read_text() == str([*ALL[-4:], "--model", "llava-cot-swires-published"])
