"""One backbone as Kaggle can take it: weights as safetensors, a tokenizer.json that loads right everywhere."""

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from prefcls_lib.models.backbones import find_backbone, load_backbone, load_encoder, read_pretrained
from prefcls_lib.models.reward import is_reward_model
from prefcls_lib.runtime.files import UserError, read_json, write_json

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MIN_LENGTH = 16  # tokens: any backbone takes as many; its real limit is checked when it is used
# Encoded by the original and by the rewritten tokenizer; both must agree.
PROBES = ("Plain words, 12 of them.", "two\nlines\n\tand a tab", "naïve Ελληνικά русский 中文 日本語 한국어 العربية",
          "[SEP] </s>", "x" * 3000, "")  # fmt: skip


def find_source(name: str) -> Path:
    """Where a backbone lies; fetched from the hub where there is one."""
    path = find_backbone(name)
    for file in sorted(path.iterdir()):
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(
                        f"backbone {name!r}: {file} is a Git-LFS pointer, not the file itself. Run `git lfs pull` in "
                        "its repository, or download the file."
                    )
    return path


def prepare_backbone(name: str, source: Path, target: Path) -> None:
    """Write the backbone in `source` to the new folder `target`, checked.

    Safetensors are copied byte for byte. Other weights are rewritten as safetensors, in fp16 where they were fp16, and
    a reward model's with the layers that score. The tokenizer is written anew by this transformers, without the
    truncation and padding that some carry, and must still give the same ids.
    """
    backbone = load_backbone(str(source), MIN_LENGTH)
    auto_class = AutoModelForSequenceClassification if is_reward_model(backbone.config) else AutoModel
    model = load_encoder(source, 0.0, auto_class)
    target.mkdir(parents=True)
    weights = [p for p in sorted(source.iterdir()) if p.name.startswith("model") and ".safetensors" in p.name]
    # without a version transformers 5.0 takes a vocabulary of this size for Mistral's, and warns of its regex
    write_json(
        target / "config.json", {"transformers_version": transformers.__version__, **read_json(source / "config.json")}
    )
    for file in weights:
        shutil.copyfile(file, target / file.name)
    if not weights:
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        if all(torch.equal(tensor.half().to(tensor.dtype), tensor) for tensor in state.values()):
            state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})  # transformers 5.0 renames some
        load_encoder(target, dropout=0.0)
    tokenizer = backbone.tokenizer.tokenizer
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(folder) / file, target / file)
    again = load_backbone(str(target), MIN_LENGTH).tokenizer.tokenizer
    fresh = read_pretrained(AutoTokenizer, source)
    for text in PROBES:
        before, after = (t(text, truncation=False, padding=False)["input_ids"] for t in (fresh, again))
        if before != after:
            raise UserError(
                f"backbone {name!r}: its tokenizer.json, written anew, splits {text[:30]!r} in another way. Use a "
                "folder whose tokenizer.json was written by transformers 5.4 or newer."
            )
