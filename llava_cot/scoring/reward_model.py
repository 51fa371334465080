"""Reward models as scorers: one scalar for a question, the text written so far and, if the model sees it, the image."""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack, runtime_checkable

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    MllamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.mllama.modeling_mllama import MllamaModel, MllamaPreTrainedModel

from llava_cot.checkpoint import checkpoint_sha256
from llava_cot.core import Call, Program
from llava_cot.literal import MARK, marked, without_marks
from llava_cot.scoring.scorer import Span
from llava_cot.scoring.text_chats import chat_ids, check_template

View = Callable[[Image.Image], Image.Image]


class RewardModel(MllamaPreTrainedModel):
    """An Mllama with a scalar head in place of its LM head, read at the last token that is not padding.

    ``save_pretrained`` and ``from_pretrained`` are those of transformers. The processor is saved beside the model. This
    is the architecture of Skywork-VL-Reward (arXiv 2505.07263).
    """

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        self.model = MllamaModel(config)
        self.head = torch.nn.Linear(config.text_config.hidden_size, 1)
        self.post_init()

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        """Return ``logits`` [B, 1], the larger the better. ``attention_mask`` [B, T] is 0 for padding."""
        hidden = self.model(attention_mask=attention_mask, use_cache=False, **inputs).last_hidden_state
        at = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * at).argmax(dim=1)
        return SequenceClassifierOutput(logits=self.head(hidden[torch.arange(len(hidden)), last]))


@runtime_checkable
class ChatRewardModel(Protocol):
    """A reward model with the interface of InternLM-XComposer2.5-Reward (arXiv 2501.12368)."""

    def get_scores(self, chats: list[list[dict[str, str]]], images: list[list[str]], /, *, hd_num: int) -> list[float]:
        """Return a score for each chat, which is one user turn and one assistant turn.

        ``images`` are the image files of each chat. An image is cut into at most ``hd_num`` tiles.
        """


class _Settings(TypedDict, total=False):
    view: View | None
    batch_size: int
    hd_num: int


class _Shown(NamedTuple):
    """What a reward model is shown of a candidate."""

    image: Image.Image | None  # None for a model that reads text only
    question: str
    text: str
    tags: list[str]  # of the grammar; the tokenizer may have them as special tokens


class RewardModelScorer:
    """Scores candidates by a reward model of the question, the text of the whole path and, if it sees it, the image.

    It reads the whole path because a reasoning that is judged without its caption may contradict the caption and win.

    A model that sees the image is shown the text as an unfinished turn of the assistant, as ``llava-cot train-reward``
    trains it. A model that is given with its tokenizer reads text only, and no image is opened. It is shown a whole
    chat: the question as the user's turn, and the text as a turn of the assistant that has ended. Such models, e.g.
    Skywork-Reward (arXiv 2410.18451), were trained on whole chats and at their last token only. So the candidate of an
    early stage is read as if the answer ended there.

    Args:
        model: a ``RewardModel``, any transformers model whose output has ``logits`` [B, 1], or a ``ChatRewardModel``.
        processor: the model's processor, or the tokenizer of a model that reads text only. It must have the chat
            template that the model was trained with. A ``ChatRewardModel`` needs none.
        view: turns the image that was asked about into the one that the reward model sees, e.g. a larger one. By
            default both are the same.
        batch_size: the number of texts per forward pass. A model for text whose config has no ``pad_token_id`` reads
            one text at a time, because transformers could not find the last token of a padded one.
        hd_num: the most tiles of an image, for a ``ChatRewardModel``.

    Raises:
        ValueError: ``batch_size`` below 1, a model that needs a processor without one, or one with several labels. Or a
            tokenizer without a chat template, with a ``view``, or of a model that sees images.
    """

    def __init__(
        self,
        model: PreTrainedModel | ChatRewardModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
        *,
        view: View | None = None,
        batch_size: int = 32,
        hd_num: int = 9,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if processor is None and not isinstance(model, ChatRewardModel):
            raise ValueError("processor must be given for a model without get_scores, got None")
        labels = getattr(getattr(model, "config", None), "num_labels", 1)
        if labels != 1 and not isinstance(model, RewardModel | ChatRewardModel):
            raise ValueError(f"model must have one label, got num_labels={labels}")
        self._is_for_text = isinstance(processor, PreTrainedTokenizerBase) and not isinstance(model, ChatRewardModel)
        if self._is_for_text:
            if sees_images(getattr(model, "config", None)):
                raise ValueError("processor must be the whole processor of a model that sees images, got its tokenizer")
            if view is not None:
                raise ValueError(f"view must be None for a model that reads text only, got {view!r}")
            check_template(processor)
        self.model: Any = model  # Any, because a ChatRewardModel is called in another way
        self.processor: Any = processor
        self.view, self.batch_size, self.hd_num = view, batch_size, hd_num

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        **settings: Unpack[_Settings],
    ) -> "RewardModelScorer":
        """Load a folder or a hub name; ``settings`` are keyword arguments of the constructor.

        ``trust_remote_code`` runs the repository's own code. InternLM-XComposer2.5-Reward needs that.

        Raises:
            ValueError: ``trust_remote_code`` without a full commit hash as ``revision``, because a branch can change.
        """
        if trust_remote_code:
            pinned = pinned_code(revision)
            model = AutoModel.from_pretrained(name, dtype=dtype, **pinned)
            model.tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
            processor = None if isinstance(model, ChatRewardModel) else AutoProcessor.from_pretrained(name, **pinned)
        else:
            config = AutoConfig.from_pretrained(name, revision=revision)
            ours = (config.architectures or [None])[0] == RewardModel.__name__
            load = RewardModel if ours else AutoModelForSequenceClassification
            model = load.from_pretrained(name, dtype=dtype, revision=revision)
            # A tokenizer that was taken from a model with images may still name that model's processor.
            processor = (AutoProcessor if sees_images(config) else AutoTokenizer).from_pretrained(
                name, revision=revision
            )
        return cls(model.to(device).eval() if device is not None else model.eval(), processor, **settings)

    def __call__(self, spans: Sequence[Span]) -> Program[list[float]]:
        """Score the spans in one call together with those of other searches."""
        return (yield [Call(self.get_scores, spans)])[0]

    def get_scores(self, spans: Sequence[Span]) -> list[float]:
        """Return one number for each span, the larger the better.

        It reads ``question``, ``path_text`` and, if the model sees it, ``image``. The texts of a batch may be about
        several images. A text has the score that it has alone, but for rounding.

        Raises:
            ValueError: a span has no question, as in ``generator.generate``, or not exactly one image.
        """
        shown = self._shown(spans)
        score = self._from_text if self._is_for_text else self._from_logits
        if isinstance(self.model, ChatRewardModel):
            score = self._from_chats
        lengths = [len(one.question) + len(one.text) for one in shown]
        order = sorted(range(len(shown)), key=lengths.__getitem__)  # similar lengths need little padding
        scores = [0.0] * len(shown)
        for start in range(0, len(shown), self.batch_size):
            batch = order[start : start + self.batch_size]
            with torch.inference_mode():
                found = score([shown[index] for index in batch])
            for index, value in zip(batch, found, strict=True):
                scores[index] = float(value)
        return scores

    def _shown(self, spans: Sequence[Span]) -> list[_Shown]:
        views: dict[int, tuple[Image.Image, Image.Image]] = {}  # with the image itself, or another one may get its id
        shown = []
        for span in spans:
            image = None if self._is_for_text else span.image
            if span.question is None or (image is None and not self._is_for_text):
                needed = "the question" if self._is_for_text else "the image and the question"
                raise ValueError(f"a reward model needs {needed} of every span, got None")
            if image is not None:
                if id(image) not in views:
                    views[id(image)] = image, self.view(image) if self.view else image
                image = views[id(image)][1]
            shown.append(_Shown(image, span.question, span.path_text.rstrip(), span.grammar.all_tags))
        return shown

    def _from_logits(self, shown: list[_Shown]) -> list[float]:
        tokenizer = self.processor.tokenizer
        read = [self._prompt(one.question) + marked(one.text, tokenizer, keep=one.tags) for one in shown]
        if len(read) > 1 and any(MARK in text for text in read):  # marks are taken out of one text at a time
            return [self._from_logits([one])[0] for one in shown]
        # The chat template has written the special tokens already.
        options: dict[str, Any] = {"add_special_tokens": False, "padding": True, "padding_side": "right"}
        inputs = self.processor(images=[[one.image] for one in shown], text=read, **options, return_tensors="pt")
        inputs = BatchFeature(without_marks(inputs, read[0], tokenizer))
        return self.model(**inputs.to(self.model.device, self.model.dtype)).logits.flatten().tolist()

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": marked(question, self.processor.tokenizer)}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _from_text(self, shown: list[_Shown]) -> list[float]:
        # transformers takes the last token that is not the config's pad_token_id, whatever the mask or the tokenizer
        # says. So padding must be that token, which may be none, or -1, or have no embedding.
        config = self.model.config.get_text_config()
        pad = -1 if config.pad_token_id is None else config.pad_token_id
        if len(shown) > 1 and not 0 <= pad < config.vocab_size:
            return [self._from_text([one])[0] for one in shown]
        rows = [torch.tensor(chat_ids(one.question, one.text, self.processor, tags=one.tags)) for one in shown]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)  # int64 [B, T]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.flatten().tolist()

    def _from_chats(self, shown: list[_Shown]) -> list[float]:
        turns = [(("user", one.question), ("assistant", one.text)) for one in shown]
        chats = [[{"role": role, "content": content} for role, content in chat] for chat in turns]
        images = [one.image for one in shown if one.image is not None]
        dtype = getattr(self.model, "dtype", None)
        half = dtype in (torch.float16, torch.bfloat16) and self.model.device.type == "cuda"
        with tempfile.TemporaryDirectory() as folder, torch.autocast("cuda", dtype) if half else nullcontext():
            files = {id(image): str(Path(folder, f"{id(image)}.png")) for image in images}
            for image in {id(image): image for image in images}.values():
                image.save(files[id(image)])
            return self.model.get_scores(chats, [[files[id(image)]] for image in images], hd_num=self.hd_num)


def sees_images(config: PreTrainedConfig | None) -> bool:
    """Whether the model with this config has a vision encoder."""
    return getattr(config, "vision_config", None) is not None


def pinned_code(revision: str | None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that run a repository's own code as it was at one commit.

    Raises:
        ValueError: ``revision`` is no full commit hash, because a branch can change.
    """
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(f"revision must be a commit of 40 hex digits with trust_remote_code, got {revision!r}")
    # revision does not pin code in another repository. code_revision makes such a model fail to load.
    return {"revision": revision, "code_revision": revision, "trust_remote_code": True}


def verify_policy(
    folder_or_config: str | Path | Mapping[str, object] | PreTrainedConfig, policy_path: str | Path
) -> None:
    """Raise ``ValueError`` unless ``policy_sha256`` in the verifier's config is the hash of this policy's weights.

    A config without it, and a folder without weights, match nothing.
    """
    config = folder_or_config
    if isinstance(config, str | Path):
        config = AutoConfig.from_pretrained(config)
    wanted = config.get("policy_sha256") if isinstance(config, Mapping) else getattr(config, "policy_sha256", None)
    got = checkpoint_sha256(policy_path)
    if wanted is None or wanted != got:
        raise ValueError(f"policy_path must hold the policy with policy_sha256={wanted}, got {got}")
