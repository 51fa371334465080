import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, MllamaConfig, MllamaImageProcessorPil, MllamaProcessor

from llava_cot.data import collate
from llava_cot.data.collate import Collator
from llava_cot.data.example import IGNORE_INDEX, Example
from llava_cot.tiny import tiny_path

IMAGE = 640
CONFIG = MllamaConfig()


@pytest.fixture(scope="module")
def processor():
    image_processor = MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    return MllamaProcessor(image_processor, AutoProcessor.from_pretrained(tiny_path()).tokenizer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate([(28, 28), (28, 84)]):  # 1 and 3 tiles
        Image.new("RGB", size, (index, 50, 90)).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(2)]


def example(ids: list[int], learnt: int, images: list[str]) -> Example:
    """The last ``learnt`` tokens are learnt, their stage is 2."""
    labels = [IGNORE_INDEX] * (len(ids) - learnt) + ids[len(ids) - learnt :]
    return Example(ids, labels, [2 if label >= 0 else -1 for label in labels], images)


def test_targets_are_the_next_tokens_of_the_same_sequence(processor):
    rows = [[example([1, 2, 3], 3, []), example([4, 5], 1, [])], [example([6, 7, 8, 9], 2, [])], []]
    batch = Collator(processor, CONFIG, pad_to_multiple_of=4)(rows)
    pad = processor.tokenizer.pad_token_id
    assert batch.inputs["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, pad, pad, pad],
        [6, 7, 8, 9, pad, pad, pad, pad],
        [pad] * 8,
    ]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3] + [0] * 4, [0] * 8]
    assert batch.targets.tolist() == [[2, 3, -100, 5] + [-100] * 4, [-100, 8, 9] + [-100] * 5, [-100] * 8]
    assert batch.stages.tolist() == [[2, 2, -1, 2] + [-1] * 4, [-1, 2, 2] + [-1] * 5, [-1] * 8]
    assert (batch.num_tokens, batch.num_padding) == (5, 24 - 9)


def test_what_tokens_see(processor, files):
    one = example([1, IMAGE, 2], 1, files[1:])
    two = example([3, 4, IMAGE, 5, IMAGE, 6], 1, files)
    inputs = Collator(processor, CONFIG)([[one, example([7], 0, []), two], [example([1, IMAGE], 0, files[:1])]]).inputs
    three, none, every = [1, 1, 1, 0], [0] * 4, [1] * 4
    # The first row's images: the one of three tiles, which two examples share, then the one of a single tile.
    assert inputs["cross_attention_mask"][0].tolist() == [
        *([every, none], [three, none], [three, none]),
        [none, none],
        *([every, every], [every, every]),
        *([none, [1, 0, 0, 0]], [none, [1, 0, 0, 0]]),
        *([three, none], [three, none]),
    ]
    assert inputs["cross_rows"][0].tolist() == [[1, 0], [1, 1], [1, 1], [0, 0], [1, 0], [1, 0], *[[1, 1]] * 4]
    assert inputs["cross_rows"][1].tolist() == [[1, 0], [1, 1], *[[0, 0]] * 8]
    assert inputs["aspect_ratio_ids"].tolist() == [[7, 1], [1, 0]]
    assert inputs["aspect_ratio_mask"].tolist() == [[three, [1, 0, 0, 0]], [[1, 0, 0, 0]] * 2]
    assert not inputs["pixel_values"][1, 1].any()


def test_vision_inputs_are_the_processors(processor, files):
    rows = [[example([IMAGE, 5], 1, files[:1]), example([IMAGE, 5], 1, files[1:])], [example([IMAGE, 5], 1, files[1:])]]
    inputs = Collator(processor, CONFIG)(rows).inputs
    opened = [Image.open(path) for path in files]
    expected = processor.image_processor(images=[opened, opened[1:]], return_tensors="pt")
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert torch.equal(inputs[name], expected[name]) and inputs[name].dtype == expected[name].dtype


def test_a_file_is_read_once(processor, files, monkeypatch):
    opened = []
    monkeypatch.setattr(collate, "open_image", lambda path: opened.append(path) or Image.open(path).convert("RGB"))
    one, both = example([IMAGE, 5], 1, files[:1]), example([IMAGE, IMAGE, 5], 1, files)
    inputs = Collator(processor, CONFIG)([[one, one, both], [one]]).inputs
    assert sorted(opened) == files
    assert inputs["pixel_values"].shape[:2] == (2, 2)


def test_an_example_that_shows_an_image_twice_has_two_places(processor, files):
    twice = example([IMAGE, IMAGE, 5], 1, [files[0], files[0]])
    assert Collator(processor, CONFIG)([[twice, twice]]).inputs["aspect_ratio_ids"].tolist() == [[1, 1]]


@pytest.mark.parametrize("rows", [[[]], [[], []], [[Example([5, 6], [5, 6], [0, 0], [])]]])
def test_a_batch_without_an_image_has_a_dummy(processor, rows):
    inputs = Collator(processor, CONFIG)(rows).inputs
    assert inputs["aspect_ratio_ids"][0].tolist() == [1]
    assert not any(inputs[name].any() for name in ("pixel_values", "cross_attention_mask", "cross_rows"))
    assert inputs["input_ids"].shape == (len(rows), max(1, max(sum(len(e.input_ids) for e in row) for row in rows)))


def test_a_tokenizer_without_a_pad_token_pads_with_a_real_one(processor):
    tokenizer = AutoProcessor.from_pretrained(tiny_path()).tokenizer
    tokenizer.pad_token = None
    bare = MllamaProcessor(processor.image_processor, tokenizer)
    zeros = example([0, 0, 0], 3, [])
    batch = Collator(bare, CONFIG)([[zeros], [example([0], 0, [])]])
    assert batch.targets.tolist() == [[0, 0, -100], [-100] * 3]
    assert batch.num_padding == 2


def test_a_loader_with_workers_and_a_move(processor, files):
    rows = [[example([1, IMAGE, 2], 1, files[:1])]]
    (loaded,) = DataLoader([rows], batch_size=None, collate_fn=Collator(processor, CONFIG), num_workers=1)
    here = Collator(processor, CONFIG)(rows)
    moved = loaded.to("cpu", non_blocking=True)
    assert all(torch.equal(moved.inputs[name], tensor) for name, tensor in here.inputs.items())
    assert torch.equal(moved.targets, here.targets) and moved.num_tokens == here.num_tokens == 1


def broken(path, kind: str) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG" if kind == "cut" else "PNG")
    content = path.read_bytes()
    if kind == "chunk":  # a PNG whose second chunk has a broken name: its decoder raises a SyntaxError
        content = content[:33] + b"\x00\x00\x00\x01\xff\xff\xff\xff" + content[41:]
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "chunk": content}[kind])
    return str(path)


@pytest.mark.parametrize("kind", ["cut", "text", "chunk", "missing"])
def test_an_unreadable_image_is_named(processor, tmp_path, kind):
    path = str(tmp_path / "missing.png") if kind == "missing" else broken(tmp_path / "bad.png", kind)
    with pytest.raises(ValueError, match=f"image '{path}' must be readable: ."):
        Collator(processor, CONFIG)([[example([IMAGE, 5], 1, [path])]])


def test_images_and_image_tokens_must_agree(processor, files):
    with pytest.raises(ValueError, match=r"an image token for each of images=\['.*0.png'\], got 2 image tokens"):
        Collator(processor, CONFIG)([[example([IMAGE, IMAGE, 5], 1, files[:1])]])
    with pytest.raises(ValueError, match=r"an image token for each of images=\[\], got 1 image tokens"):
        Collator(processor, CONFIG)([[example([IMAGE, 5], 1, [])]])


def test_bad_arguments(processor):
    with pytest.raises(ValueError, match="pad_to_multiple_of must be >= 1, got 0"):
        Collator(processor, CONFIG, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="rows must be at least one, got none"):
        Collator(processor, CONFIG)([])
