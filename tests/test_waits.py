"""No hidden waits for the GPU: whatever reads a value from the device, or copies to it unpinned, stops the host.

The host must stay ahead of the GPU. `WaitDetector` runs a step on the meta device, which has shapes and no values, and
notes every operation that on CUDA would wait until all queued work is done.
"""

import traceback
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from prefcls_lib.data.batching import Examples
from prefcls_lib.models.network import PreferenceHead, PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides
from prefcls_lib.models.reward import RewardPooler
from prefcls_lib.training.step import accumulate_gradients

READS = ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
         "repeat_interleave")  # fmt: skip
# What transformers does by itself, one wait a padded batch among thousands of kernels: it asks if a mask is full,
# and DeBERTa's bucket in the middle is made on the CPU.
OF_TRANSFORMERS = (
    "masking_utils.py _ignore_bidirectional_mask_sdpa: ",
    "modeling_deberta_v2.py make_log_bucket_position: copy to the device",
)


class WaitDetector(TorchDispatchMode):
    """Collects "file function: what" of every operation that would wait; reads give False or 0."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in READS and _on_meta(args[0]):
            self._note(name)
            if name in READS[:3]:
                return False if args[0].dtype == torch.bool else 0
        if name == "_to_copy" and "device" in kwargs and args[0].device.type != torch.device(kwargs["device"]).type:
            self._note("copy to the device" if torch.device(kwargs["device"]).type == "meta" else "copy to the host")
        if name == "copy_" and args[0].device.type != args[1].device.type:
            self._note("copy to the device" if _on_meta(args[0]) else "copy to the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._note("boolean index")
            if any(not _on_meta(index) for index in indices):
                self._note("index copied to the device")
        return function(*args, **kwargs)

    def _note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "transformers" in f.filename or "prefcls_lib" in f.filename]
        place = frames[-1] if frames else SimpleNamespace(filename="?", name="backward pass")
        if place.name != "to_device":  # through pinned memory on CUDA, which does not wait
            self.found.add(f"{place.filename.split('/')[-1]} {place.name}: {what}")


class NewTensors(TorchFunctionMode):
    """`torch.tensor(..., device=meta)` and `tensor[[1, 0]]` are copies from the host that nothing dispatches."""

    def __init__(self, detector: WaitDetector):
        super().__init__()
        self.detector = detector

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.detector._note("copy to the device")
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and _on_meta(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, (list, tuple, np.ndarray)) for part in index):
                self.detector._note("index copied to the device")
        return function(*args, **kwargs)


def _on_meta(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta"


def make_model(folder, **head: object) -> PreferenceModel:
    """As `build_model` makes it, on the meta device; `head`: settings of the head."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        eager = config.model_type in ("deberta-v2", "mpnet")  # transformers has no other attention for them
        encoder = AutoModel.from_config(config, attn_implementation=None if eager else "sdpa")
        return PreferenceModel(encoder, PreferenceHead(config.hidden_size, True, 0.1, **head))


def make_examples(lengths: list[int]) -> Examples:
    """Rows of two sides each, of the given lengths."""
    rows = len(lengths) // 2
    ids = [np.arange(5, 5 + length, dtype=np.int32) for length in lengths]
    return Examples(ids, np.arange(2 * rows).reshape(rows, 2), np.zeros(rows, dtype=np.int64))


def waits_of_a_step(model: PreferenceModel, examples: Examples) -> set[str]:
    """What waits in the gradients of a training step and in the embeddings of the same rows for a prediction."""
    accelerator = SimpleNamespace(
        device=torch.device("meta"), process_index=0, num_processes=1, is_main_process=True,
        autocast=nullcontext, backward=lambda loss: loss.backward(),
    )  # fmt: skip
    with WaitDetector() as detector, NewTensors(detector):
        accumulate_gradients(model, examples, np.arange(len(examples)), len(examples), 10**6, 0.1, accelerator, 0)
        embed_unique_sides(model, examples, accelerator, 0)
    return {wait for wait in detector.found if not wait.startswith(OF_TRANSFORMERS)}


@pytest.mark.parametrize("kind", KINDS)
def test_step_waits_for_nothing(backbone_folders, kind, monkeypatch):
    """Training step and prediction: no wait but those that are transformers' own."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know meta
    assert waits_of_a_step(make_model(backbone_folders[kind]), make_examples([9, 12, 5, 11])) == set()


@pytest.mark.parametrize("way", ["offset", "one order", "reward model"])
def test_no_other_way_waits(backbone_folders, way, monkeypatch):
    """A baseline's offset, a cross-encoder's one order, a reward model's pooler and skip."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    head = {"offset": {"on_baseline": True}, "one order": {"architecture": "cross"}}.get(way, {})
    model, examples = make_model(backbone_folders["bert"], **head), make_examples([9, 12, 5, 11])
    probs = np.full((len(examples), 3), 1 / 3, dtype=np.float32)
    if way == "offset":
        examples = replace(examples, offsets=probs)
    if way == "one order":
        examples = examples.in_random_order(1, 0)
    if way == "reward model":
        with torch.device("meta"):
            model.pooler, model.head.skip = RewardPooler(32, "gelu"), torch.nn.Linear(32, 1, bias=False)
    assert waits_of_a_step(model, examples) == set()
