"""The backbones as their configurations describe them, beside what the original study says of them.

    python -m report.studies.specification          writes report/studies/specification.json, which the report shows

Configurations lie in report/backbones/NAME.json; parameters are counted on torch's meta device, without weights.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from prefcls_lib.runtime.files import read_json, write_json

FOLDER = Path(__file__).parent

TOLERANCE = 0.05  # a published count of parameters further off than this is called wrong
# what a reader compares: row of the table -> key in a description
ROWS = {
    "layers": "layers", "width": "width", "attention heads": "heads", "width of a head": "head width", "FFN": "FFN",
    "vocabulary (rows of the embedding)": "vocabulary", "position embeddings": "positions", "tokenizer": "tokenizer",
    "parameters, embedding": "embedding", "parameters, layers": "backbone", "parameters, together": "total",
    "pretraining": "objective",
}  # fmt: skip
TOKENIZERS = {"Unigram": "Unigram (SentencePiece)", "BPE": "byte-level BPE", "WordPiece": "WordPiece"}


def describe_backbones(names: Iterable[str]) -> dict[str, dict]:
    """Name -> what one column of the table says, computed from the configuration; in the order of size."""
    found = {name: _describe(read_json(FOLDER.parent / "backbones" / f"{name}.json")) for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1]["total"]))


def find_errors(described: dict[str, dict], published: dict[str, dict]) -> list[str]:
    """Sentences on where the published table differs from the configurations; nothing typed, all compared."""
    errors = []
    for name, ours in described.items():
        theirs = published[name]
        title = ours["title"]
        for key in ("layers", "width", "heads", "head width", "FFN"):
            if ours[key] != theirs[key]:
                errors.append(f"{title}: {key} {theirs[key]:,}, the configuration says {ours[key]:,}.")
        if ours["vocabulary"] != theirs["vocabulary"]:
            errors.append(
                f"{title}: a vocabulary of {theirs['vocabulary']:,}. The tokenizer has {ours['pieces']:,} pieces; "
                f"the embedding, where the parameters are, has {ours['vocabulary']:,} rows."
            )
        if ours["absolute positions"] != theirs["positions"]:
            errors.append(f"{title}: {theirs['positions']} position embeddings; it has {ours['positions']}.")
        if "(BPE)" in theirs["tokenizer"] and ours["tokenizer model"] != "BPE":
            errors.append(f"{title}: tokenizer “{theirs['tokenizer']}”; its model is {ours['tokenizer']}.")
        for key, what in (("embedding", "the embedding"), ("backbone", "the layers"), ("total", "all")):
            if abs(ours[key] / 1e6 / theirs[key] - 1) > TOLERANCE:
                errors.append(f"{title}: {theirs[key]} M parameters in {what}; there are {_show(key, ours[key])}.")
        if abs((theirs["embedding"] + theirs["backbone"]) / theirs["total"] - 1) > TOLERANCE:
            errors.append(
                f"{title}: {theirs['embedding']} M and {theirs['backbone']} M, together {theirs['total']} M: the "
                "column does not add up."
            )
    return errors


def _describe(saved: dict) -> dict:
    config = saved["config"]
    embedding, layers = _count_parameters(config)
    absolute = config["max_position_embeddings"] if config.get("position_biased_input", True) else 0
    positions = f"{absolute} absolute"
    if config.get("relative_attention"):
        positions = f"{2 * config['position_buckets']} relative, {absolute or 'none'} absolute"
    elif config["model_type"] == "roberta":  # it counts from pad_token_id + 1
        positions += f" ({absolute - config['pad_token_id'] - 1} tokens)"
    return {
        "title": saved["title"], "names": saved["names"], "source": saved["source"], "objective": saved["objective"],
        "layers": config["num_hidden_layers"], "width": config["hidden_size"], "FFN": config["intermediate_size"],
        "heads": config["num_attention_heads"], "head width": config["hidden_size"] // config["num_attention_heads"],
        "vocabulary": config["vocab_size"], "pieces": saved["tokenizer"]["pieces"], "absolute positions": absolute,
        "positions": positions, "tokenizer model": saved["tokenizer"]["model"],
        "tokenizer": TOKENIZERS[saved["tokenizer"]["model"]], "embedding": embedding, "backbone": layers,
        "total": embedding + layers,
    }  # fmt: skip


def _count_parameters(config: dict) -> tuple[int, int]:
    """Parameters of the embeddings and of all the rest but the pooler, which is not used here."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embedding = sum(size for name, size in sizes.items() if name.startswith("embeddings."))
    pooler = sum(size for name, size in sizes.items() if name.startswith("pooler."))
    return embedding, sum(sizes.values()) - embedding - pooler


def _show(key: str, value: object) -> str:
    if key in ("embedding", "backbone", "total"):
        return f"{value / 1e6:.1f} M"
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_specification() -> dict:
    """What the report shows: a description of each published backbone, the table's lines, the errors found."""
    published = read_json(FOLDER.parent / "published.json")["study"]["specification"]
    described = describe_backbones(published)
    lines = [[title, *(_show(key, one[key]) for one in described.values())] for title, key in ROWS.items()]
    return {"backbones": described, "lines": lines, "errors": find_errors(described, published)}


def main() -> None:
    """Compute, write, print the errors."""
    found = make_specification()
    write_json(FOLDER / "specification.json", found)
    print(*found["errors"], sep="\n")


if __name__ == "__main__":
    main()
