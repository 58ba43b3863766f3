"""WikiText-103 (Merity et al. 2016): 103 million words of Wikipedia, by words or by subwords; perplexity.

    python train.py --config=configs/lm_wikitext103.py:transformer_xl                                267,735 words, as published
    python train.py --config=configs/lm_wikitext103.py:transformer_xl_bpe                            subwords of the raw text
    python train.py --config=configs/lm_wikitext103.py:transformer_xl --config.task.path=FOLDER      where there is no network

transformer_xl is the 16-layer model of Dai et al. 2019 as kimiyoung/transformer-xl trains it (pytorch/run_wt103_base.sh):
published 24.0 perplexity a word on the test split (151M parameters), with segments of 64, a memory of 640 and distances clamped
at 400. There the embedding and the softmax are adaptive; here they are one tied table of 267,736 vectors. The metric is the loss
in nats a token; its exponential is the perplexity, which is a word's only where tokens are words. transformer is the same without
memory (ours). Needs the tokenizers package to make the tokens once. Expected time: not run.
"""

from efficient_attn.config import experiment


def recipe(mixer: dict, **task) -> dict:
    return {
        "task": task,
        "model": dict(
            depth=16, width=410, feed_forward_width=2100, feed_forward="relu", prenorm=False, final_norm=False, tied=True,
            dropout=0.1, embed_dropout=0.1, mixer=dict(mixer, num_heads=10, head_dim=41, use_bias=False),
        ),
        "optimizer": dict(learning_rate=2.5e-4, schedule="cosine", clip_norm=0.25),
        "train": dict(
            batch_size=60, duration="200000 steps", eval_every="4000 steps", checkpoint_every="4000 steps", log_every=200,
            loss_chunk=50, eval_batch_size=10,
        ),
    }  # fmt: skip


XL = dict(name="transformer_xl", memory_length=150, eval_memory_length=640)
WITHOUT = dict(name="softmax", bias=dict(name="transformer_xl"))
BPE = dict(corpus="wikitext103", tokenizer="bpe", max_vocab=32_768)

RECIPES = {
    "transformer_xl": recipe(XL),
    "transformer": recipe(WITHOUT),
    "transformer_xl_bpe": recipe(XL, **BPE),
    "transformer_bpe": recipe(WITHOUT, **BPE),
}


def get_config(recipe: str = "transformer_xl"):
    task = dict(
        name="lm_tokens", corpus="wikitext103_words", tokenizer="words", max_vocab=267_736, context=150, order="streams"
    )  # fmt: skip
    return experiment(name="lm_wikitext103", task=task, recipes=RECIPES, recipe=recipe)
