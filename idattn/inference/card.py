"""The model card of an export: what the model is, what it was trained on, and how to load it."""

from typing import Any

import jax

from idattn import __version__
from idattn.config import Config
from idattn.data.tokenizer import Tokenizer

_CARD = """---
library_name: idattn
pipeline_tag: text-generation
tags:
- interdomain-attention
- jax
---

# {mixers}, {parameters:,} parameters

A language model trained with idattn {version}, the JAX library of
[Interdomain Attention](https://arxiv.org/abs/2605.24330). The weights are those of step {step:,}.

```python
import idattn

# This folder, or hf:OWNER/NAME where it is on the Hugging Face hub.
decoder, tokenizer, config, step = idattn.load("FOLDER")
(completion,) = idattn.generate_text(decoder, tokenizer, ["Once"], num_tokens=100)
print(completion.text)
```

| | |
| --- | --- |
{table}

`config.json` has all settings. The program that wrote this card knows neither a licence nor the uses and limits of the
model: state them before you publish it.
"""


def model_card(config: Config, params: Any, step: int, tokenizer: Tokenizer, val_loss: float | None = None) -> str:
    """The card as Markdown, with the metadata that the Hugging Face hub reads.

    Args:
      config: of the run.
      params: pytree of arrays.
      step: optimiser steps that the weights have seen.
      tokenizer: of the model.
      val_loss: of these weights, in nats per token; None where it was not measured.
    """
    model, data, mixers = config.model, config.data, " + ".join(config.model.mixers)
    tokens = config.train.batch_size * data.seq_len
    rows = {
        "token mixers" if len(model.mixers) > 1 else "token mixer": mixers,
        "layers, width, heads": f"{model.num_layers}, {model.model_dim}, {model.num_heads}",
        "tokenizer": f"{tokenizer.vocab_size:,} ids, fingerprint `{tokenizer.fingerprint[:12]}`",
        "trained on": ", ".join(f"`{source}`" for source in (data.source, *data.more_sources)),
        "tokens": f"{step * tokens:,}: {step:,} steps of {tokens:,}, in windows of {data.seq_len:,}",
        "held out": ", ".join(f"`{name}`" for name in data.holdout) or "the validation documents of these sources",
        "validation loss": "not measured" if val_loss is None else f"{val_loss:.4f} nats per token",
        "seed": f"{config.seed}",
    }
    return _CARD.format(
        mixers=mixers,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        version=__version__,
        step=step,
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )
