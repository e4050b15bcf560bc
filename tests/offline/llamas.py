"""Small Llama-shaped models, and tokenizers for them, as transformers writes them."""

from __future__ import annotations

import torch

LAYERS = 4


def llama(seed, *, layers=LAYERS, start=None, tied=False, dtype=torch.float32, **settings):
    """A model; finetuned from `start` where that is given: all weights are moved, in part alike for all seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.pop("vocab_size", 64),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **settings,
    )
    model = LlamaForCausalLM(config)
    common = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            moved, alike = torch.randn(tensor.shape), torch.randn(tensor.shape, generator=common)
            learned = 0.01 * moved + 0.006 * alike
            tensor.copy_(start.state_dict()[name] + learned if start is not None else 0.1 * moved)
    return model.to(dtype)


def save_tokenizer(folder, words=64):
    """A tokenizer of words w0 w1 ..., as its files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{number}": number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
