"""What a user keeps: a model that is loaded in Python, its card, and the record of a run in trackers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from test_train import make_config, make_examples, make_model

import prefcls_lib
from prefcls_lib.data import loading
from prefcls_lib.data.schema import TEXT_COLUMNS
from prefcls_lib.pipeline.folder import read_probs
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop

PAIR = (["What is 2 + 3?"], ["5"], ["2 + 3 is 6."])


def test_a_run_predicts_on_texts_what_it_predicts_on_rows(finished_run, home):
    """Of the test rows: the submission; turns are lists of texts, and one turn may be a text."""
    rows = loading.read_rows(home / "test.csv", labelled=False)
    model = prefcls_lib.load(finished_run)
    probs = model.predict_proba(*(list(rows[name]) for name in TEXT_COLUMNS))
    np.testing.assert_allclose(probs, read_probs(finished_run / "submission.csv"), atol=1e-9)
    assert model.predict(*PAIR)[0] == model.classes[model.predict_proba(*PAIR).argmax()]
    np.testing.assert_array_equal(model.predict_proba([[t] for t in PAIR[0]], *PAIR[1:]), model.predict_proba(*PAIR))


def test_exchanged_answers_exchange_the_probabilities(finished_run):
    """Exactly; also of one model of the run, and another prompt beside it changes nothing."""
    prompts, a, b = PAIR
    for place in (finished_run, finished_run / "model" / "fold0"):
        model = prefcls_lib.load(place)
        assert (model.predict_proba(prompts, b, a)[:, [1, 0, 2]] == model.predict_proba(prompts, a, b)).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [(("What is 2 + 3?", ["5"], ["6"]), r"prompt: expected a list with .*not 'What is"),
     (([], [], []), r"prompt: expected a list with .*not \[\]"),
     ((["one", "two"], ["5"], ["6"]), r"response_a: expected a list with as many texts as the other lists"),
     ((["one"], ["5"], [["6", 7]]), r"response_b: expected texts .of a conversation: lists of")],
)  # fmt: skip
def test_texts_that_are_none_are_refused(finished_run, texts, message):
    """What, where, and what to give instead."""
    with pytest.raises(UserError, match=message):
        prefcls_lib.load(finished_run).predict_proba(*texts)


def test_load_names_what_is_wrong_with_a_folder(tmp_path, finished_run):
    """No run, one that is not complete, one of a version with other settings."""
    with pytest.raises(UserError, match=r"result\.json: no such file"):
        prefcls_lib.load(tmp_path)
    (tmp_path / "config.json").write_text((finished_run / "config.json").read_text())
    with pytest.raises(UserError, match="Is this the folder of a finished run"):
        prefcls_lib.load(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "preference.json").write_text(json.dumps({"settings": {"pooling": "mean"}}))
    with pytest.raises(UserError, match=r"model: cannot be read .*pooling"):
        prefcls_lib.load(model)


def test_each_folder_has_a_card(finished_run):
    """The hub's header is read by its own library; the numbers are those of result.json."""
    result = json.loads((finished_run / "result.json").read_text())
    for place in (finished_run, finished_run / "model" / "fold0"):
        card = ModelCard.load(place / "README.md")
        data = card.data.to_dict()
        assert (data["language"], data["license"], data["library_name"]) == ("en", "apache-2.0", "prefcls-lib")
        assert "chatbot-arena" in data["tags"] and "log_loss" in data["metrics"]
        assert f"Log loss {result['log_loss']:.4f}" in card.text
        assert result["data_sha256"]["train"] in card.text
        assert f'prefcls_lib.load("{place.name}")' in card.text


def test_trackers_that_cannot_be_used_are_refused():
    """Of no such name, or not installed: which there are."""
    assert make_accelerator("no", "none").log_with == []
    for report_to, name in (("tensorbord", "tensorbord"), ("tensorboard, ClearML", "clearml")):
        with pytest.raises(UserError, match=f"no tracker '{name}' is installed. Choose among none, all, tensorboard"):
            make_accelerator("no", report_to)


def test_any_tracker_of_accelerate_gets_each_validation(tiny):
    """At its step, numbers alone; what was not measured is left out."""
    sent, config = [], make_config(validations_per_epoch=2)
    accelerator = make_accelerator("no")
    recorder = SimpleNamespace(name="recorder", log=lambda values, step: sent.append((values, step)))
    accelerator.trackers = [recorder]
    given = (make_model(tiny, config), make_examples(32, 1), make_examples(9, 2), config, accelerator)
    history = loop.fit(*given).history
    assert [step for _, step in sent] == history["step"].tolist()
    assert [values["valid_log_loss"] for values, _ in sent] == history["valid_log_loss"].tolist()
    assert all(isinstance(value, float) for values, _ in sent for value in values.values())
