"""PG-19 (Rae et al. 2020, arXiv 1911.05507): 28,752 books, 11 GB, by subwords, documents one after the other.

    python train.py --config=configs/lm_pg19.py:compressive_transformer
    python train.py --config=configs/lm_pg19.py:compressive_transformer --config.task.path=FOLDER      with train/, valid/, test/

The paper's models have 36 layers of width 1,024, segments of 512, memories of 512 and 512 compressed by 2, and a vocabulary of
32,000 subwords; published perplexity a word on the test split: 33.6, and 36.3 for Transformer-XL with 1,024 states. What
metrics.jsonl has is nats a subword; a word's perplexity is exp(nats x subwords / words) with the release's counts of words.
Schedule and dropout are ours. Needs the tokenizers package to make the tokens once. Expected time: not run.
"""

from efficient_attn.config import experiment


def recipe(mixer: dict) -> dict:
    return {
        "model": dict(
            depth=36, width=1024, feed_forward_width=4096, feed_forward="relu", tied=True, dropout=0.1,
            mixer=dict(mixer, num_heads=16),
        ),
        "optimizer": dict(learning_rate=3e-4, schedule="cosine", warmup="4000 steps", clip_norm=0.1),
        "train": dict(
            batch_size=128, duration="100000 steps", eval_every="2000 steps", checkpoint_every="2000 steps", log_every=100,
            loss_chunk=128,
        ),
    }  # fmt: skip


RECIPES = {
    "compressive_transformer": recipe(
        dict(name="compressive_transformer", memory_length=512, compressed_length=512, compression_rate=2)
    ),
    "transformer_xl": recipe(dict(name="transformer_xl", memory_length=1024)),
}


def get_config(recipe: str = "compressive_transformer"):
    task = dict(name="lm_tokens", corpus="pg19", tokenizer="bpe", max_vocab=32_000, context=512, order="streams", documents=True)
    return experiment(name="lm_pg19", task=task, recipes=RECIPES, recipe=recipe)
