"""The model card: README.md of a run folder and of each of its models, with the Hugging Face hub's header."""

from pathlib import Path

from huggingface_hub import ModelCardData

import prefcls_lib
from prefcls_lib.config import RunConfig
from prefcls_lib.evaluation.compare import Comparison
from prefcls_lib.models.recipes import HUB_NAMES
from prefcls_lib.runtime.files import write_text

TEXT = """---
{header}
---

# {title}

Predicts which of two answers to a prompt people prefer: P(A wins), P(B wins), P(tie).
Made with prefcls-lib {version}: {what}.

## Use

```python
import prefcls_lib

model = prefcls_lib.load("{folder}")
model.predict_proba(["What is 2 + 3?"], ["5"], ["2 + 3 is 6."])  # (1, 3): A wins, B wins, tie
```

If A and B are exchanged, the probabilities are exchanged{exactly}.

## Result

Log loss {log_loss:.4f} (95 % interval {interval}), accuracy {accuracy:.3f}, on {valid_rows:,} rows that no
part of the model was fitted on; no prompt of theirs was in the training rows.
{comparison}
Guessing the class shares gives about 1.097 on the competition's rows, a uniform guess 1.099.

## Training

{rows:,} rows (SHA-256 of the file: `{data}`), seed {seed}. Settings that differ from the defaults:

{settings}

## Limits

The votes are those of one platform, mostly on English prompts, and from the years in which they were given.
A vote says which answer people preferred, not which is right: longer answers and lists win more often.
On single rows people often disagree, so most probabilities lie between 0.2 and 0.6.
{licence}
"""


def write_cards(folder: Path, config: RunConfig, result: dict, models: list[Path]) -> None:
    """Write README.md into the run folder and into its model folders."""
    for place in (folder, *models):
        write_text(place / "README.md", make_card(place, config, result))


def make_card(place: Path, config: RunConfig, result: dict) -> str:
    """The text of a card, from result.json and the settings."""
    share, baseline, base = result["encoder_share"], result["baseline"], ""
    what, comparison = f"the baseline {baseline}, without a network", ""
    if share:
        base = HUB_NAMES.get(result["backbone"], result["backbone"])
        base = "sentence-transformers/all-MiniLM-L6-v2" if base == "minilm" else base
        what = f"a network on {base} that corrects the baseline {baseline}"
        told = Comparison.from_dict(share).describe()
        comparison = f"Its baseline has {result['baseline_log_loss']:.4f}: with the network it is {told}.\n"
    header = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="prefcls-lib",
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        tags=["preference-prediction", "reward-model", "chatbot-arena", "siamese"],
        metrics=["log_loss", "accuracy"],
        pipeline_tag="text-classification",
    )
    default, (low, high) = RunConfig().to_dict(), result["log_loss_interval"]
    hidden = ("train", "test", "out", "resume_from")
    changed = [f"- `{k}: {v}`" for k, v in config.to_dict().items() if v != default[k] and k not in hidden]
    return TEXT.format(
        header=header.to_yaml(),
        title=f"{place.resolve().name}: preference between two answers",
        version=prefcls_lib.__version__,
        what=what,
        folder=place.name,
        exactly=", exactly" if config.head == "symmetric" else " only about: this head reads one order of them",
        interval=f"{low:.4f} to {high:.4f}",
        comparison=comparison,
        data=result["data_sha256"]["train"],
        settings="\n".join(changed) or "- none",
        licence=f"The licence of {base} holds, too." if base else "",
        **{name: result[name] for name in ("log_loss", "accuracy", "valid_rows", "rows", "seed")},
    )
