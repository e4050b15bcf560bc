"""Small models of transformers, as tensors and as checkpoints."""

import json

import torch
import transformers
from safetensors.torch import save_file

transformers.utils.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = torch.arange(2, 42).view(2, 20)


class Model:
    """A model as its checkpoint has it: config.json as a dict, and tensors."""

    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {n: t.contiguous().clone() for n, t in self.tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        return folder

    def load(self, folder):
        """By transformers; nothing may be missing and nothing left over."""
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            self.save(folder), output_loading_info=True, dtype=torch.float32
        )
        assert not found["missing_keys"], found
        assert not found["unexpected_keys"], found
        assert not found["mismatched_keys"], found
        return model.eval()

    def generated(self, folder):
        """What the loaded model makes of `TOKENS`: these and up to four more, or less where it ends by itself."""
        return self.load(folder).generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=1)

    def logits(self, folder):
        with torch.no_grad():
            return self.load(folder)(TOKENS).logits
