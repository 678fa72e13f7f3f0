"""The model card: README.md of a run folder and of each of its models, with the Hugging Face hub's header."""

from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCardData

import prefcls_lib
from prefcls_lib.config import RunConfig
from prefcls_lib.evaluation.compare import Comparison
from prefcls_lib.models.recipes import HUB_NAMES
from prefcls_lib.runtime.files import write_text

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def write_cards(folder: Path, config: RunConfig, result: dict, models: list[Path]) -> None:
    """Write README.md into the run folder and into its model folders."""
    for place in (folder, *models):
        write_text(place / "README.md", make_card(place, config, result))


def make_card(place: Path, config: RunConfig, result: dict) -> str:
    """The text of a card: card.md beside this file, filled in from result.json and the settings."""
    name, baseline, share = result["backbone"], result["baseline"], result["encoder_share"]
    what, base, comparison = f"the baseline {baseline}, without a network", "", ""
    if share:
        base = MINILM if name == "minilm" else HUB_NAMES.get(name, name)
        what = f"a network on {base} that corrects the baseline {baseline}"
        told = Comparison.from_dict(share).describe()
        comparison = f"Its baseline has {result['baseline_log_loss']:.4f}: with the network it is {told}.\n"
    header = ModelCardData(
        language="en", license="apache-2.0", library_name="prefcls-lib", pipeline_tag="text-classification",
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        tags=["preference-prediction", "reward-model", "chatbot-arena", "siamese"], metrics=["log_loss", "accuracy"],
    )  # fmt: skip
    default, (low, high) = RunConfig().to_dict(), result["log_loss_interval"]
    hidden = ("train", "test", "out", "resume_from")
    changed = [f"- `{k}: {v}`" for k, v in config.to_dict().items() if v != default[k] and k not in hidden]
    return (resources.files(__package__) / "card.md").read_text(encoding="utf-8").format(
        header=header.to_yaml(), title=f"{place.resolve().name}: preference between two answers", folder=place.name,
        version=prefcls_lib.__version__, what=what, interval=f"{low:.4f} to {high:.4f}", comparison=comparison,
        exactly=", exactly" if config.head == "symmetric" else " only about: this head reads one order of them",
        data=result["data_sha256"]["train"], settings="\n".join(changed) or "- none",
        licence=f"The licence of {base} holds, too." if base else "",
        **{name: result[name] for name in ("log_loss", "accuracy", "valid_rows", "rows", "seed")},
    )  # fmt: skip
