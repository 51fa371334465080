"""The tokenizer, chat template and processor of the bundled tiny model (version 1, fixed).

A byte-level BPE with Llama 3's special tokens and its way of cutting words, so that the stage tags behave as they do
in the 11B model: no tag is one token, ``</`` takes the space before it and ``>`` the line breaks after it.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MllamaImageProcessorPil, MllamaProcessor, PreTrainedTokenizerFast

from llava_cot.data import shapes
from llava_cot.stages import render

VOCAB_SIZE = 640  # <|image|> is id VOCAB_SIZE: it has an embedding and no row in the head
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
IMAGE_TOKEN = "<|image|>"
# Llama 3's pattern, but a number takes the space before it, as words do.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def byte_pairs(special_tokens: int, corpus_seeds: range = range(4000)) -> Tokenizer:
    """Train the BPE on the world's own text, in a vocabulary that leaves room for so many special tokens.

    Merges end when every word is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = (shapes.sample(seed) for seed in corpus_seeds)
    turns = (f"user\n\n{s.question}\nassistant\n\n{render(s.stages)}" for s in samples)
    tokenizer.train_from_iterator(turns, trainer)
    return tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Add Llama 3's special tokens to the BPE. What is left of the vocabulary is reserved."""
    tokenizer = byte_pairs(len(SPECIAL_TOKENS))
    reserved = VOCAB_SIZE - len(SPECIAL_TOKENS) - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(
        [*SPECIAL_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in range(reserved)), IMAGE_TOKEN]
    )
    bos = SPECIAL_TOKENS[0]  # as in Llama 3, add_special_tokens=True puts one in front, whether there is one or not
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_processor() -> MllamaProcessor:
    """Tokenizer and image processor; images become one 48 x 48 tile."""
    image_processor = MllamaImageProcessorPil(size={"height": shapes.SIZE, "width": shapes.SIZE}, max_image_tiles=1)
    return MllamaProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def prompt(processor: MllamaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
