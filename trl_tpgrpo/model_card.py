"""The card that goes to the Hub with a trained adapter or transformer."""

from huggingface_hub import ModelCard, ModelCardData


USAGE_OF_LORA = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base_model}", torch_dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("{repo}")
image = pipeline("{prompt}", guidance_scale={guidance_scale}).images[0]"""

USAGE_OF_TRANSFORMER = """import torch
from diffusers import {transformer_class}, DiffusionPipeline

transformer = {transformer_class}.from_pretrained("{repo}", subfolder="transformer", torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained("{base_model}", transformer=transformer, torch_dtype=torch.bfloat16).to("cuda")
image = pipeline("{prompt}", guidance_scale={guidance_scale}).images[0]"""

CARD = """# {model_name}

{what}, fine-tuned by reinforcement learning with
[TurningPoint-GRPO](https://huggingface.co/papers/2602.06422) and `trl-tpgrpo`.

## Quick start

```python
{usage}
```

## Training

{settings}

## Citations

```bibtex
@article{{tong2026alleviating,
    title   = {{Alleviating Sparse Rewards by Modeling Step-Wise and Long-Term Sampling Effects in Flow-Based GRPO}},
    author  = {{Yunze Tong and Mushui Liu and Canyu Zhao and Wanggui He and Shiyi Zhang and Hongwei Zhang and Peng Zhang
               and Jinlong Liu and Ju Huang and Jiamang Wang and Hao Jiang and Pipei Huang}},
    year    = 2026,
    journal = {{arXiv preprint arXiv:2602.06422}},
}}
```

```bibtex
@misc{{vonwerra2020trl,
    title        = {{TRL: Transformer Reinforcement Learning}},
    author       = {{Leandro von Werra and Younes Belkada and Lewis Tunstall and Edward Beeching and Tristan Thrush and
                    Nathan Lambert and Shengyi Huang and Kashif Rasul and Quentin Gallou\u00e9dec}},
    year         = 2020,
    howpublished = {{\\url{{https://github.com/huggingface/trl}}}},
}}
```
"""


def build_model_card(
    *,
    model_name: str,
    repo: str,
    base_model: str | None,
    transformer_class: str,
    is_lora: bool,
    settings: dict[str, object],
    dataset_name: str | None,
    tags: list[str],
    prompt: str,
) -> ModelCard:
    """Compose the card: metadata in the Hub's conventions for diffusers, a usage snippet and the run's settings.

    `base_model` is a Hub id, or `None` for a local model, which nobody else could load.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=dataset_name,
        model_name=model_name,
        tags=sorted({*tags, "text-to-image", "diffusers", *(["lora"] if is_lora else [])}),
    )
    origin = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    usage = (USAGE_OF_LORA if is_lora else USAGE_OF_TRANSFORMER).format(
        base_model=base_model or "the base model",
        repo=repo,
        transformer_class=transformer_class,
        prompt=prompt.replace('"', '\\"'),
        guidance_scale=settings["guidance_scale"],
    )
    body = CARD.format(
        model_name=model_name,
        what=("A LoRA adapter" if is_lora else "A transformer") + origin,
        usage=usage,
        settings="\n".join(f"- `{name}`: {value}" for name, value in settings.items()),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
