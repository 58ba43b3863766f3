"""Runs Hugging Face transformers' Llama for benchmarks/generation.py, in a Python of its own that has torch and transformers.

Arguments: threads, a file for the weights (.npz), vocabulary, width, depth, heads, key/value heads, hidden size of the
feed-forward network, positions. Makes a model with random weights and writes them; prints its versions as a line of JSON; then,
for every line [prompts, new tokens] on standard input, generates greedily with its cache, and answers the new tokens.
"""

import json
import sys

import numpy as np
import torch
import transformers


def main() -> None:
    threads, weights, *sizes = sys.argv[1:]
    vocab, width, depth, heads, kv_heads, hidden, positions = map(int, sizes)
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        max_position_embeddings=positions,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    np.savez(weights, **{name: value.numpy() for name, value in model.state_dict().items()})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "torch_threads": int(threads)}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
            )
        print(json.dumps(out[:, tokens.shape[1] :].tolist()), flush=True)


if __name__ == "__main__":
    main()
