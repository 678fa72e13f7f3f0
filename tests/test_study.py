"""The study on the shipped rows says what came out otherwise than committed."""

import json

from report.studies import study


def test_what_moved_is_named(tmp_path):
    """A baseline by .0011 and the ladder by .0030 are over their tolerances, a network by .0010 is not; one is new."""

    def put(place: str, boosting: float, ladder: float, minilm: float, *names: str) -> dict:
        lines = [{"rung": "prior", "log_loss": 1.0973}, {"rung": "structure_boosting", "log_loss": boosting}]
        results = {"ladder": {"log_loss": ladder, "ladder": lines}, "minilm": {"log_loss": minilm}}
        results |= {name: {"log_loss": 1.06} for name in names}
        for name, result in results.items():
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return study.read_log_losses(tmp_path / place)

    before = put("committed", 1.0585, 1.0516, 1.0513)
    said = study.compare_with_committed(before, put("here", 1.0574, 1.0546, 1.0523, "minilm-cross")).splitlines()
    assert said[0].startswith("2 of 5 log losses")
    assert said[1] == "  structure_boosting: 1.0585 committed, 1.0574 here, -0.0011"
    assert said[2] == "  ladder: 1.0516 committed, 1.0546 here, +0.0030"
    assert said[3] == "  minilm-cross: not committed, 1.0600 here"
